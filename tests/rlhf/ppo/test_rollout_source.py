"""Rollouts: sampled when they are asked for, or in the background of the update; how either side ends the other."""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reward_data import Message, Prompt
from rlhf.data.batches import PromptBatch, Rollout
from rlhf.distributed import collectives
from rlhf.ppo import rollout_source
from rlhf.ppo.rollout_source import BackgroundTask, Cancelled, Prefetched, RolloutSource, records_of
from rlhf.ppo.step_profiler import PhaseTimer

CPU = torch.device("cpu")
BROKEN = RuntimeError("broken")
PROMPTS = [Prompt((Message("user", f"{i}"),), "helpful", f"p:{i}") for i in range(3)]
LAST, BATCH, GROUP = 4, 8, 2


def rollout_of(ids_B: torch.Tensor, iteration: int) -> Rollout:
    """Rows that can be told apart by their tokens."""
    number_B1 = 100 * iteration + ids_B[:, None]
    mask = torch.ones(len(ids_B), 3, dtype=torch.bool)
    return Rollout(number_B1 * torch.ones(1, 3).long(), mask, mask[:, :2], mask[:, :2].float(), mask[:, 0])


class FakeSampler:
    """Its responses tell prompt and iteration, its positions the iteration."""

    def __init__(self, work: Callable[[Any], None] = lambda go_on: None) -> None:
        self.work, self.positions, self.asked = work, (0, 0), []

    def sample(self, prompts: PromptBatch, settings: Any, seed: int, iteration: int, go_on: Any = None) -> Rollout:
        self.asked.append((iteration, seed, go_on is None, threading.get_ident()))
        self.work(go_on)
        self.positions = (iteration, -iteration)
        return rollout_of(prompts.ids_B, iteration)


@pytest.fixture
def source(monkeypatch) -> Any:
    """source(sampler, one_step_off_policy) → a RolloutSource over PROMPTS; batch n has the keys 8n, 8n + 1, …"""
    return lambda *arguments: source_of(monkeypatch, *arguments)


def source_of(patch: pytest.MonkeyPatch, sampler: Any, one_step_off_policy: bool) -> RolloutSource:
    def next_prompts(tokenizer: Any, prompts: Any, config: Any, iteration: int) -> PromptBatch:
        ids_B = torch.arange(BATCH) + BATCH * iteration
        return PromptBatch(ids_B[:, None], ids_B[:, None] >= 0, ids_B % 3 == 0, ids_B)

    patch.setattr(rollout_source, "next_prompts", next_prompts)
    sampling = SimpleNamespace(one_step_off_policy=one_step_off_policy)
    ppo = SimpleNamespace(batch_size=BATCH, group_size=GROUP, iterations=LAST, sampling=sampling)
    config: Any = SimpleNamespace(ppo=ppo, seed=5)
    return RolloutSource(config, sampler, None, PROMPTS, PhaseTimer(CPU))


# --- what comes next ------------------------------------------------------------------------------------------------


def test_without_prefetching_every_iteration_is_sampled_when_it_is_asked_for(source):
    sampler = FakeSampler()
    made = source(sampler, False)
    for iteration in (1, 2):
        sampled = made.next(iteration)
        with made.prefetching(iteration + 1) as go_on:
            go_on()
        assert sampled.rollout.tokens_BT[:, 0].tolist() == [100 * iteration + 8 * iteration + i for i in range(8)]
        assert sampled.staleness == 0
    assert sampler.asked == [(n, 5, True, threading.get_ident()) for n in (1, 2)]


def test_prefetched_responses_are_one_update_old_and_none_is_sampled_after_the_last_iteration(source):
    sampler, stale = FakeSampler(), []
    made = source(sampler, True)
    for iteration in range(1, LAST + 1):
        sampler.positions = (7, 7)  # an evaluation
        sampled = made.next(iteration)
        stale.append(sampled.staleness)
        assert sampled.rollout.tokens_BT[:, 0].tolist() == [100 * iteration + 8 * iteration + i for i in range(8)]
        assert sampler.positions == (iteration, -iteration)
        with made.prefetching(iteration + 1):
            pass
    assert stale == [0, 1, 1, 1]
    assert [(iteration, alone) for iteration, _, alone, _ in sampler.asked] == [(1, True)] + [
        (n, False) for n in (2, 3, 4)
    ]
    assert made.prefetched.rollout is None


def test_every_row_has_its_own_record(source):
    """Keys count rows; each prompt has two of them in turn, and after the last prompt comes the first."""
    sampled = source(FakeSampler(), False).next(1)
    assert [p.source for p in sampled.prompts] == ["p:1", "p:1", "p:2", "p:2", "p:0", "p:0", "p:1", "p:1"]
    assert sampled.batch.ids_B.tolist() == list(range(8, 16))
    assert records_of(sampled.batch, PROMPTS, GROUP) == sampled.prompts


def test_a_rank_samples_its_own_rows_of_the_batch(source, monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    sampled = source(FakeSampler(), False).next(1)
    assert sampled.rollout.tokens_BT[:, 0].tolist() == [112, 113, 114, 115]
    assert [p.source for p in sampled.prompts] == ["p:0", "p:0", "p:1", "p:1"]
    assert len(sampled.batch.ids_B) == 8  # of all ranks


# --- in the background of the update --------------------------------------------------------------------------------


def test_the_next_responses_are_sampled_while_the_models_are_trained(source):
    training, sampled = threading.Event(), threading.Event()

    def work(go_on: Any) -> None:
        assert training.wait(60)
        go_on()
        sampled.set()

    sampler = FakeSampler(work)
    made = source(sampler, True)
    with made.prefetching(2) as go_on:
        training.set()
        assert sampled.wait(60)
        go_on()
    assert sampler.asked[0][3] != threading.get_ident()


def test_time_that_sampling_took_of_its_own_is_no_overlap(source, monkeypatch):
    """Of six seconds, two were beside the update; the update took three."""
    shown, started, trained = SimpleNamespace(now=100.0), threading.Event(), threading.Event()
    monkeypatch.setattr(rollout_source, "time", SimpleNamespace(perf_counter=lambda: shown.now))

    def work(go_on: Any) -> None:
        started.set()
        assert trained.wait(60)
        shown.now += 4.0

    made = source(FakeSampler(work), True)
    result = BackgroundTask.result

    def waiting(task: Any) -> Any:
        trained.set()
        return result(task)

    monkeypatch.setattr(BackgroundTask, "result", waiting)
    with made.prefetching(2):
        assert started.wait(60)
        shown.now += 2.0
    assert made._timer.overlapped["sampling"] == 2.0


def test_a_sampler_that_fails_stops_the_update(source):
    def work(go_on: Any) -> None:
        raise BROKEN

    with pytest.raises(RuntimeError, match="^broken$"), source(FakeSampler(work), True).prefetching(2) as go_on:
        while True:
            go_on()
            time.sleep(0.001)


def test_a_sampler_that_fails_after_the_last_minibatch_is_told_too(source):
    late = threading.Event()

    def work(go_on: Any) -> None:
        late.wait(60)
        raise BROKEN

    with pytest.raises(RuntimeError, match="^broken$"), source(FakeSampler(work), True).prefetching(2):
        late.set()


def test_an_update_that_fails_stops_the_sampler(source):
    def work(go_on: Any) -> None:
        while True:
            go_on()
            time.sleep(0.001)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="^broken$"), source(FakeSampler(work), True).prefetching(2):
        raise BROKEN
    assert threading.active_count() == before


def test_a_thread_is_told_that_nobody_wants_its_result_and_has_as_many_threads_as_its_maker():
    told = []

    def work(go_on: Any) -> None:
        told.append(torch.get_num_threads())
        try:
            while True:
                go_on()
                time.sleep(0.001)
        except Cancelled as error:
            told.append(error)
            raise

    with pytest.raises(RuntimeError, match="^broken$"), BackgroundTask(work, CPU):
        raise BROKEN
    assert told[0] == torch.get_num_threads() and isinstance(told[1], Cancelled)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_what_was_prefetched_is_saved_and_loaded(tmp_path):
    prefetched, loaded, nothing = Prefetched(), Prefetched(), Prefetched()
    given = rollout_of(torch.arange(3), 2)
    prefetched.keep(given, (7, 8))
    prefetched.save(tmp_path / "prefetched")
    loaded.load(tmp_path / "prefetched")
    nothing.save(tmp_path / "nothing")
    nothing.load(tmp_path / "nothing")
    assert nothing.take() is None
    taken = loaded.take()
    assert taken is not None and taken[1] == (7, 8)
    for name, tensor in vars(given).items():
        assert torch.equal(getattr(taken[0], name), tensor), name
    assert loaded.take() is None  # once


# --- two ranks ------------------------------------------------------------------------------------------------------


def on_a_rank(rank: int, store: Any, failing: str, results: Any) -> None:
    """An update whose minibatches speak to the other rank; the second rank fails where it is told to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def work(go_on: Any) -> None:
        time.sleep(0.1)
        if rank == 1 and failing == "sampling":
            raise BROKEN
        go_on()

    made = source_of(pytest.MonkeyPatch(), FakeSampler(work), True)
    try:
        with made.prefetching(2) as go_on:
            for step in range(50):
                if rank == 1 and failing == "update" and step == 5:
                    raise BROKEN
                collectives.gather_objects(step)
                time.sleep(0.01)
                go_on()
        results.put((rank, made.next(2).rollout.tokens_BT[:, 0].tolist()))
    except RuntimeError as error:
        results.put((rank, str(error)))


@pytest.mark.integration
@pytest.mark.parametrize("failing", ["nowhere", "sampling", "update"])
def test_two_ranks_prefetch_their_own_rows_and_fail_together(tmp_path, failing):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    given = (tmp_path / "store", failing, results)
    processes = [context.Process(target=on_a_rank, args=(rank, *given), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    told = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode is not None
    if failing == "nowhere":
        assert told == {0: [216, 217, 218, 219], 1: [220, 221, 222, 223]}
    else:
        assert told[1] == "broken"
        assert re.search("closed by peer|reset by peer", told[0], re.IGNORECASE)
