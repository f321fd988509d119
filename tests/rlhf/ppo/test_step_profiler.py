"""Seconds that add up, and tokens that are counted where they are computed: at the embeddings of a model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.config import HardwareConfig, OptimConfig, RunConfig
from rlhf.data.batches import select
from rlhf.distributed.engine import LocalEngine
from rlhf.generation import InProcessSampler, in_process
from rlhf.models.policy import PolicyModel
from rlhf.ppo import step_profiler
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.experience import make_experience
from rlhf.ppo.models import Models
from rlhf.ppo.scoring import score_rollout
from rlhf.ppo.step_profiler import (
    COMPUTING,
    PHASES,
    PhaseTimer,
    Tokens,
    Work,
    rates,
    sampling_work,
    scoring_work,
    update_work,
    work,
)
from rlhf.ppo.update import update
from rlhf.profiling.roofline import Machine, ModelSize, backward_flops, forward_flops
from rlhf.rewards import Combined

EOS, PAD, CPU = 2, 0, torch.device("cpu")
KINDS = ("useful", "prompt", "padded", "dropped")

# --- seconds ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch) -> Any:
    """A watch that the test turns on by hand."""
    shown = SimpleNamespace(now=100.0)
    monkeypatch.setattr(step_profiler, "time", SimpleNamespace(perf_counter=lambda: shown.now))
    return shown


def test_every_second_belongs_to_one_phase_and_one_iteration(watch):
    timer, told = PhaseTimer(CPU), []
    for _ in range(2):
        for phase, inside in (("sync", 1.0), ("sampling", 4.0), ("logging", 0.25), ("logging", 0.5)):
            watch.now += 0.125
            with timer(phase):
                watch.now += inside
        told.append(timer.close())
        watch.now += 2.0  # after the first iteration was told: the second one's
    assert [metrics["perf/seconds_other"] for metrics in told] == [0.5, 2.5]
    assert [metrics["perf/seconds_iteration"] for metrics in told] == [6.25, 8.25]
    for metrics in told:
        seconds = {phase: metrics[f"perf/seconds_{phase}"] for phase in PHASES}
        assert sum(seconds.values()) == metrics["perf/seconds_iteration"]
        assert (seconds["sync"], seconds["sampling"], seconds["logging"], seconds["update"]) == (1.0, 4.0, 0.75, 0.0)


def test_what_a_thread_does_beside_a_phase_is_told_and_belongs_to_that_phase(watch):
    timer = PhaseTimer(CPU)
    with timer("sampling"):
        watch.now += 4.0
    timer.overlap("scoring", 3.0)
    metrics, after = timer.close(), timer.close()
    assert (metrics["perf/overlapped_seconds_scoring"], after["perf/overlapped_seconds_scoring"]) == (3.0, 0.0)
    assert (metrics["perf/seconds_sampling"], metrics["perf/seconds_iteration"]) == (4.0, 4.0)


def test_a_phase_that_is_none_is_refused():
    with pytest.raises(KeyError), PhaseTimer(CPU)("smapling"):
        pass


def test_memory_is_told_of_the_phases_that_ran(monkeypatch):
    timer, resident = PhaseTimer(CPU), iter([5, 9, 7])
    monkeypatch.setattr(step_profiler, "memory", lambda device: next(resident))
    for phase in ("update", "logging", "logging"):
        with timer(phase):
            pass
    metrics = timer.close()
    told = {name: value for name, value in metrics.items() if "memory" in name}
    assert told == {"perf/memory_update": 5, "perf/memory_logging": 9}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it there")
def test_memory_on_a_cpu_is_what_is_resident():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    assert step_profiler.memory(CPU) == pytest.approx(1024 * int(line.split()[1]), rel=0.1)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def positions(monkeypatch) -> Any:
    """positions(model) → how many tokens were looked up in its embeddings since it was asked last."""
    seen, look_up = Counter(), torch.nn.functional.embedding

    def counted(tokens: torch.Tensor, table: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        seen[id(table)] += tokens.numel()
        return look_up(tokens, table, *others, **named)

    monkeypatch.setattr(torch.nn.functional, "embedding", counted)

    def of(model: torch.nn.Module) -> int:
        return seen.pop(id(next(part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding))))

    return of


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 3},
        {"micro_batch_tokens": 25},
        {"micro_batch_tokens": 25, "packing": True},
        {"micro_batch_tokens": 50, "packing": True, "group_size": 4},
    ],
    ids=str,
)
def test_the_kinds_of_token_add_up_to_what_the_models_computed(
    make_llama, make_scalar, prompts, ppo_config, positions, monkeypatch, settings, tuned
):
    if not tuned:
        monkeypatch.setattr(in_process, "is_plain_llama", lambda model: False)
    ppo = ppo_config.model_copy(update={"minibatch_size": 4, "epochs": 2, **settings})
    of_each, slots = ppo.group_size, 5 if ppo.group_size == 1 else 8
    prompts = dataclasses.replace(select(prompts, torch.arange(8) // of_each), ids_B=torch.arange(8))
    ppo = ppo.model_copy(update={"sampling": ppo.sampling.model_copy(update={"batch_size": slots})})
    config = run_config(ppo)
    sampler = InProcessSampler(make_llama(0), [EOS], PAD)
    policy, critic = PolicyModel(make_llama(0), ppo.packing), make_scalar(2)
    critic.packing = ppo.packing
    trained = learning(policy), learning(critic)
    rollout = sampler.sample(prompts, ppo.sampling, config.seed, 1)
    sampled = positions(sampler.model)
    experience = experience_of(rollout, *trained, ppo)
    scored = [positions(policy), positions(critic)]
    update(*trained, experience, ppo, (config.seed, 1), kl_loss_coef=0.0)
    learned = [positions(policy), positions(critic)]
    metrics = work(rollout, sampler, [policy, critic], [policy, critic], config, 1)
    tokens = {phase: [metrics[f"perf/tokens_{phase}_{kind}"] for kind in KINDS] for phase in COMPUTING}
    assert sum(tokens["sampling"]) == sampled
    assert [sum(tokens["scoring"])] * 2 == scored
    assert [sum(tokens["update"])] * 2 == learned
    answers, prompt_tokens = int(rollout.response_mask_BR.sum()), int(prompts.mask_BP[::of_each].sum())
    assert tokens["sampling"][:2] == [answers - 8 + 8 // of_each, prompt_tokens - 8 // of_each]
    assert tokens["scoring"][:2] == [answers, prompt_tokens]
    assert tokens["update"][:2] == [2 * answers, 2 * prompt_tokens]
    assert all(count >= 0 for counts in tokens.values() for count in counts)
    assert (tokens["update"][2] > 0) == (not ppo.packing)
    assert (tokens["sampling"][2] > 0) == (not tuned)
    assert metrics["perf/token_efficiency_sampling"] == tokens["sampling"][0] / sampled


def run_config(ppo) -> RunConfig:
    data = {role: {"train": []} for role in ("demonstrations", "preferences", "prompts")}
    return RunConfig.model_validate({"name": "x", "data": data, "ppo": ppo.model_dump()})


def learning(module: Any) -> LocalEngine:
    return LocalEngine(module.requires_grad_(True), OptimConfig(lr=1e-3), 9, HardwareConfig())


def experience_of(rollout: Any, policy: LocalEngine, critic: LocalEngine, ppo: Any) -> Any:
    """Scored by a reference that nobody counts, and by a reward without a model."""

    def reference(tokens_BT: torch.Tensor, mask_BT: torch.Tensor, R: int, temperature: float) -> Any:
        return (torch.zeros(len(tokens_BT), R),)

    score_B, failed_B = torch.arange(8.0), torch.zeros(8, dtype=torch.bool)
    models = Models(policy, reference, critic, {}, sampler=None, tokenizer=None)  # type: ignore[arg-type]
    scores = score_rollout(rollout, models, (score_B[:, None], failed_B[:, None]), ppo)
    return make_experience(rollout, scores, Combined(score_B, failed_B), estimator_of(ppo), ppo, kl_coef=0.1)[0]


# --- work, by hand ----------------------------------------------------------------------------------------------------

SIZE = ModelSize(
    backbone=10, head=100, backbone_learns=10, head_learns=0, all_learn=7, attention=3, weight_bytes=1000, cache_bytes=5
)
PROMPT_B, ANSWER_B = torch.tensor([4, 2, 3, 3]), torch.tensor([1, 5, 3, 2])
UNSHARED_B, SHARED_B = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 0, 3])  # the last two have one prompt


def test_sampling_by_hand():
    """Two ranks of two rows, one slot each. Prompts: 12 tokens and 3 of padding. Steps: 7, and 2 for ended rows."""
    done = sampling_work(PROMPT_B, ANSWER_B, UNSHARED_B, [15, 9], SIZE, slots=1, world=2)
    assert done.tokens == Tokens(useful=11, prompt=8, padded=3, dropped=2)
    assert done.flops == forward_flops(SIZE, torch.tensor([4, 6, 5, 4]), 11)
    weights = (1 + 4) + (1 + 3)  # prompts once, then a pass for each of 0 + 4 and of 2 + 1 tokens
    seen = (3 + 4 + 5 + 6) + (4 + 5) + 4  # keys and values, the token's own inside
    assert done.bytes == weights * 1000 + seen * 5


def test_more_slots_need_fewer_steps_but_not_fewer_than_the_longest_answer():
    one, two, many = (
        sampling_work(PROMPT_B, ANSWER_B, UNSHARED_B, [12, 7], SIZE, slots, 1).bytes for slots in (1, 2, 9)
    )
    assert (one - two, two - many) == ((7 - 4) * 1000, 0)


def test_scoring_by_hand():
    done = scoring_work(PROMPT_B, ANSWER_B, UNSHARED_B, 30, [SIZE, SIZE], world=3)
    assert done.tokens == Tokens(useful=11, prompt=12, padded=7, dropped=0)
    assert done.flops == 2 * forward_flops(SIZE, PROMPT_B + ANSWER_B, 11)
    assert done.bytes == 3 * 2 * 1000


def test_update_by_hand():
    done = update_work(PROMPT_B, ANSWER_B, UNSHARED_B, 60, [SIZE], epochs=2, steps=6)
    assert done.tokens == Tokens(useful=22, prompt=24, padded=14, dropped=0)
    rows_B = PROMPT_B + ANSWER_B
    assert done.flops == 2 * (forward_flops(SIZE, rows_B, 11) + backward_flops(SIZE, rows_B, 11))
    assert done.bytes == 6 * 28 * 7


def test_a_shared_prompt_counts_once_by_hand():
    """3 prompt tokens, of which the last is where the first tokens of two answers are drawn; then (query, key) pairs."""
    done = sampling_work(PROMPT_B, ANSWER_B, SHARED_B, [12, 7], SIZE, slots=9, world=1)
    assert done.tokens == Tokens(useful=10, prompt=6, padded=3, dropped=0)  # it was read twice all the same
    pairs = (4 * 5 + 6 * 7 + 5 * 6 + 4 * 5 - 3 * 4) // 2
    assert done.flops == 2 * (10 * (9 + 7) + 100 * 10) + 4 * 3 * pairs
    pairs = (5 * 6 + 7 * 8 + 6 * 7 + 5 * 6 - 3 * 4) // 2
    forward = 2 * (10 * (9 + 11) + 100 * 11) + 4 * 3 * pairs
    done = scoring_work(PROMPT_B, ANSWER_B, SHARED_B, 20, [SIZE], world=1)
    assert (done.tokens, done.flops) == (Tokens(useful=11, prompt=9, padded=0, dropped=0), forward)
    done = update_work(PROMPT_B, ANSWER_B, SHARED_B, 43, [SIZE], epochs=2, steps=6)
    assert done.tokens == Tokens(useful=22, prompt=18, padded=3, dropped=0)
    assert done.flops == 2 * (2 * forward + 2 * 10 * (9 + 11) + 4 * 3 * pairs)


def test_speeds_and_shares_of_the_limit_by_hand():
    done = {
        "sampling": Work(Tokens(9, 7, 3, 1), flops=100.0, bytes=400.0),
        "scoring": Work(Tokens(10, 10, 0, 0), flops=600.0, bytes=10.0),
        "update": Work(Tokens(30, 20, 0, 0), flops=800.0, bytes=0.0),
    }
    metrics = {f"perf/tokens_{p}_{k}": float(n) for p, w in done.items() for k, n in vars(w.tokens).items()}
    metrics |= {f"perf/flops_{p}": w.flops for p, w in done.items()} | {
        f"perf/bytes_{p}": w.bytes for p, w in done.items()
    }
    times = {"perf/seconds_sampling": 4.0, "perf/seconds_scoring": 6.0, "perf/seconds_update": 10.0}
    times |= {f"perf/overlapped_seconds_{phase}": 2.0 * (phase == "scoring") for phase in COMPUTING}
    found = rates(metrics, times, Machine(flops=200.0, bandwidth=200.0))
    assert found == {
        "perf/machine_flops": 200.0,
        "perf/machine_bandwidth": 200.0,
        "perf/tokens_per_second_sampling": 4.0,
        "perf/tokens_per_second_scoring": 2.5,
        "perf/tokens_per_second_update": 5.0,
        "perf/mfu_sampling": 0.125,
        "perf/mfu_scoring": 0.375,
        "perf/mfu_update": 0.4,
        "perf/roofline_fraction_sampling": 0.5,
        "perf/roofline_fraction_scoring": 0.375,
        "perf/roofline_fraction_update": 0.4,
        "perf/sampled_tokens_per_second": 2.5,
    }
