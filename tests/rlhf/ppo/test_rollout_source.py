"""Scores that are read beside the sampling, answers that are sampled beside the update; how either side ends the other."""

from __future__ import annotations

import multiprocessing
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlhf.data.batches import Rollout, Scores, select
from rlhf.distributed import collectives
from rlhf.ppo import rollout_source
from rlhf.ppo.rollout_source import Ahead, Beside, ScoringBeside, Unwanted, answer_and_read, learn_and_sample
from rlhf.ppo.step_profiler import PhaseTimer

CPU = torch.device("cpu")
BROKEN = RuntimeError("broken")
ENDS = [5, 2, 7, 0, 1, 6, 3, 4]  # the order in which rows end


def rollout_of(count: int) -> Rollout:
    """Rows that can be told apart by their tokens."""
    number_B1 = torch.arange(count)[:, None]
    mask = torch.ones(count, 3, dtype=torch.bool)
    return Rollout(number_B1 * torch.ones(1, 3).long(), mask, mask[:, :2], mask[:, :2].float(), mask[:, 0])


def scores_of(rollout: Rollout) -> Scores:
    number_B = rollout.tokens_BT[:, 0].float()
    once, twice, thrice = (torch.stack([number_B, -number_B], 1) * factor for factor in (1, 2, 3))
    return Scores(once, twice, thrice, number_B, -number_B, -number_B)


def read_beside(size: int, groups: list[list[int]], read: Any = scores_of) -> Any:
    """Rows are handed over in these groups."""
    with ScoringBeside(read, size, CPU) as scoring:
        for group in groups:
            scoring.take(torch.tensor(group, dtype=torch.long), select(rollout_of(8), group))
        return scoring.finish()


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8, 20])
@pytest.mark.parametrize(
    "groups", [[[row] for row in ENDS], [ENDS[:1], [], ENDS[1:6], ENDS[6:], []], [ENDS]], ids=["each", "some", "all"]
)
def test_scores_come_back_in_the_order_of_the_batch(size, groups):
    scores, chunks, _ = read_beside(size, groups)
    for name, expected in vars(scores_of(rollout_of(8))).items():
        assert torch.equal(getattr(scores, name), expected), name
    assert [chunk.tolist() for chunk in chunks] == [ENDS[start : start + size] for start in range(0, 8, size)]


def test_a_chunk_is_read_in_one_piece_by_one_other_thread():
    seen = []

    def read(rollout: Rollout) -> Scores:
        seen.append((rollout.tokens_BT[:, 0].tolist(), threading.get_ident(), torch.get_num_threads()))
        return scores_of(rollout)

    read_beside(3, [[row] for row in ENDS], read)
    assert [numbers for numbers, *_ in seen] == [ENDS[:3], ENDS[3:6], ENDS[6:]]
    assert {(thread == threading.get_ident(), threads) for _, thread, threads in seen} == {(False, 1)}


def test_chunks_are_read_while_others_are_sampled_and_that_time_is_told(monkeypatch):
    shown, was_read = SimpleNamespace(now=100.0), threading.Event()
    monkeypatch.setattr(rollout_source, "time", SimpleNamespace(perf_counter=lambda: shown.now))

    def read(rollout: Rollout) -> Scores:
        shown.now += 4.0
        was_read.set()
        return scores_of(rollout)

    with ScoringBeside(read, 4, CPU) as scoring:
        scoring.take(torch.arange(4), rollout_of(4))
        assert was_read.wait(60)
        scoring.take(torch.arange(4, 7), select(rollout_of(8), slice(4, 7)))
        _, _, seconds = scoring.finish()
    assert (seconds, shown.now) == (4.0, 108.0)  # what was left was read when the sampling was over


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_scoring_raises_ends_the_sampling():
    def read(_: Rollout) -> Scores:
        raise BROKEN

    with pytest.raises(RuntimeError, match="^broken$"), ScoringBeside(read, 1, CPU) as scoring:
        scoring.take(torch.tensor([0]), rollout_of(1))
        while True:  # sampling goes on, and no other row ends
            scoring.take(torch.tensor([], dtype=torch.long), select(rollout_of(1), slice(0)))
            time.sleep(0.001)


def test_what_scoring_raises_last_is_raised_too():
    def read(rollout: Rollout) -> Scores:
        if 4 in rollout.tokens_BT:
            raise BROKEN
        return scores_of(rollout)

    with pytest.raises(RuntimeError, match="^broken$"):
        read_beside(3, [ENDS], read)


def test_what_sampling_raises_ends_the_scoring():
    """After the chunk that is being read; those that wait are left."""
    read_rows, started = [], threading.Event()

    def read(rollout: Rollout) -> Scores:
        started.set()
        time.sleep(0.05)
        read_rows.append(rollout)
        return scores_of(rollout)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="^broken$"), ScoringBeside(read, 1, CPU) as scoring:
        scoring.take(torch.arange(8), rollout_of(8))
        started.wait(60)
        raise BROKEN
    assert len(read_rows) == 1
    assert threading.active_count() == before


def test_a_thread_is_told_that_nobody_wants_its_result():
    told = []

    def work(go_on: Any) -> None:
        try:
            while True:
                go_on()
                time.sleep(0.001)
        except Unwanted as error:
            told.append(error)
            raise

    with pytest.raises(RuntimeError, match="^broken$"), Beside(work, CPU):
        raise BROKEN
    assert len(told) == 1


# --- sampling beside the update -------------------------------------------------------------------------------------


def sampler_that_told(*positions: int) -> Any:
    return SimpleNamespace(positions=positions)


def test_the_next_answers_are_sampled_while_the_models_learn():
    ahead, learning, sampled = Ahead(), threading.Event(), threading.Event()

    def sample(on_rows: Any) -> Rollout:
        assert learning.wait(60)
        on_rows(torch.arange(2), rollout_of(2))
        sampled.set()
        return rollout_of(2)

    def learn(on_minibatch: Any) -> dict[str, float]:
        learning.set()
        assert sampled.wait(60)
        on_minibatch()
        return {"x": 1.0}

    timer, sampler = PhaseTimer(CPU), sampler_that_told(3, 4)
    assert learn_and_sample(learn, sample, ahead, sampler, timer) == {"x": 1.0}
    assert timer.overlapped["sampling"] > 0
    sampler.positions = (5, 6)  # an evaluation
    read: Any = lambda rollout: scores_of(rollout)
    rollout, _, together = answer_and_read(None, read, ahead, sampler, 2, 1, timer)  # type: ignore[arg-type]
    assert torch.equal(rollout.tokens_BT, rollout_of(2).tokens_BT) and together[0].tolist() == [0, 1]
    assert sampler.positions == (3, 4)
    assert ahead.take(sampler) is None  # once


def test_a_sampler_that_fails_stops_the_update():
    def sample(on_rows: Any) -> Rollout:
        raise BROKEN

    def learn(on_minibatch: Any) -> dict[str, float]:
        while True:
            on_minibatch()
            time.sleep(0.001)

    with pytest.raises(RuntimeError, match="^broken$"):
        learn_and_sample(learn, sample, Ahead(), sampler_that_told(), PhaseTimer(CPU))


def test_an_update_that_fails_stops_the_sampler():
    def sample(on_rows: Any) -> Rollout:
        while True:
            on_rows(torch.arange(0), rollout_of(0))
            time.sleep(0.001)

    def learn(on_minibatch: Any) -> dict[str, float]:
        raise BROKEN

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="^broken$"):
        learn_and_sample(learn, sample, Ahead(), sampler_that_told(), PhaseTimer(CPU))
    assert threading.active_count() == before


def test_what_was_sampled_ahead_is_saved_and_loaded(tmp_path):
    ahead, loaded, nothing = Ahead(), Ahead(), Ahead()
    ahead.keep(rollout_of(3), sampler_that_told(7, 8))
    ahead.save(tmp_path / "ahead")
    loaded.load(tmp_path / "ahead")
    nothing.save(tmp_path / "nothing")
    nothing.load(tmp_path / "nothing")
    assert nothing.rollout is None
    sampler = sampler_that_told(0, 0)
    rollout = loaded.take(sampler)
    assert rollout is not None and sampler.positions == (7, 8)
    for name, tensor in vars(rollout_of(3)).items():
        assert torch.equal(getattr(rollout, name), tensor), name


# --- two ranks ------------------------------------------------------------------------------------------------------


def on_a_rank(rank: int, store: Any, failing: str, results: Any) -> None:
    """Scoring that speaks to the other rank; the second rank fails where it is told to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    read = 0

    def read_together(rollout: Rollout) -> Scores:
        nonlocal read
        if rank == 1 and failing == "scoring" and read == 2:
            raise BROKEN
        numbers = collectives.gather_objects(rollout.tokens_BT[:, 0].tolist())
        read += 1
        return Scores(
            *[torch.tensor(numbers[1 - rank]).float()[:, None]] * 3, *[torch.zeros(2)] * 3
        )  # of the other rank

    try:
        with ScoringBeside(read_together, 2, CPU) as scoring:
            for step, row in enumerate(ENDS if rank == 0 else ENDS[::-1]):
                if rank == 1 and failing == "sampling" and step == 5:
                    raise BROKEN
                scoring.take(torch.tensor([row]), select(rollout_of(8), [row]))
                time.sleep(0.02 * rank)
            scores, _, _ = scoring.finish()
        results.put((rank, scores.logprobs_BR[:, 0].tolist()))
    except RuntimeError as error:
        results.put((rank, str(error)))


@pytest.mark.integration
@pytest.mark.parametrize("failing", ["nowhere", "scoring", "sampling"])
def test_two_ranks_read_the_same_chunks_together_and_fail_together(tmp_path, failing):
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
        other = dict(zip(ENDS, ENDS[::-1], strict=True))  # they end at the same time
        assert told == {rank: [float(other[row]) for row in range(8)] for rank in range(2)}
    else:
        assert told[1] == "broken"
        assert "losed by peer" in told[0]
