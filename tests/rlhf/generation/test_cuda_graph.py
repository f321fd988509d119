"""Steps as graphs, without a GPU: which are recorded, what they are given, and that the answers stay the same.

`replayed` stands in for the recording: as a graph, it computes what stands in the input that it was made with, and what
it gives stands until the next time. tests/rlhf/test_cuda.py has real ones.
"""

import dataclasses
import gc
import weakref

import pytest
import torch

from rlhf.data.batches import select
from rlhf.generation import cuda_graph
from rlhf.generation.cuda_graph import PARTS, rows_of_graph
from rlhf.generation.kv_cache import SlotCache
from rlhf.generation.llama import LlamaDecoder


@pytest.fixture
def recorded(monkeypatch):
    """Every decoder steps by graphs; the numbers of rows of those that were recorded."""
    made = []

    def replayed(step, given, stream):
        made.append(len(given.token_S))
        result = step(given)

        def replay(new):
            for own, other in zip(vars(given).values(), vars(new).values(), strict=True):
                own.copy_(other)
            return result.copy_(step(given))

        return replay

    def step(self, token_S, cache):
        cache.step()
        return self._by_graph(token_S, cache)

    monkeypatch.setattr(cuda_graph, "record", replayed)
    monkeypatch.setattr(LlamaDecoder, "step", step)
    return made


@pytest.fixture
def given(prompts):
    """Many prompts, so that rows come and go."""
    count = 24
    index = torch.arange(count) % len(prompts.ids_B)
    return dataclasses.replace(select(prompts, index), ids_B=torch.arange(count))


@pytest.mark.parametrize("slots", [1, 3, 17])
def test_the_answers_are_those_of_plain_steps(sample, given, slots, request, expect_same_rollout):
    plain = sample(given, batch_size=slots)
    made = request.getfixturevalue("recorded")
    expect_same_rollout(sample(given, batch_size=slots), plain)
    assert made


def test_slots_without_a_row_stay_finite(sample, given, recorded):
    """NaN in one of them would reach the row that gets the slot next."""
    seen = []
    write = SlotCache.keep

    def keep(cache, alive_S):
        seen.extend(x.isfinite().all() for layer in cache.layers for x in (layer.keys, layer.values))
        return write(cache, alive_S)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotCache, "keep", keep)
        sample(given, batch_size=17)
    assert seen and all(seen)


def test_graphs_are_of_few_numbers_of_rows():
    sizes = [rows_of_graph(rows, 100) for rows in range(1, 101)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) == PARTS and max(sizes) == 100
    assert [rows_of_graph(rows, 3) for rows in (1, 2, 3)] == [1, 2, 3]


def test_a_cache_that_moved_has_new_graphs(sample, given, recorded):
    sample(given, batch_size=1, max_new_tokens=9)
    once = len(recorded)
    sample(given, batch_size=1, max_new_tokens=60, eos=-1)
    assert len(recorded) > 2 * once


def frozen(step, given, stream):
    """In place of a recording: always the same, and as a graph it does not hold the step."""
    result = step(given)
    return lambda new: result


@pytest.mark.parametrize("record", [True, False])
def test_nothing_of_a_run_outlives_it(sample, given, record, request, monkeypatch):
    """Keys, values, graphs and weights of its own layout are the trainer's memory afterwards."""
    if record:
        request.getfixturevalue("recorded")
        monkeypatch.setattr(cuda_graph, "record", frozen)
    made = []
    for kind in (LlamaDecoder, SlotCache):

        def begin(self, *arguments, kind=kind, init=kind.__init__, **settings):
            made.append(weakref.ref(self))
            init(self, *arguments, **settings)

        monkeypatch.setattr(kind, "__init__", begin)
    gc.collect()
    gc.disable()
    try:
        sample(given, batch_size=3)
        assert len(made) == 2 and not any(run() for run in made)
    finally:
        gc.enable()
