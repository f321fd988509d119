"""Profile of an iteration: its seconds and tokens by phase, and how near each phase comes to the roofline.

Every second belongs to one phase. Every position that a model computes is one of four kinds of token:

    useful   a response token is drawn from it or read at it
    prompt   needed, but not part of a response: once for all rows with the prompt
    padded   fills up rows of different lengths, or reads a prompt again
    dropped  computed for a row that had already ended

Metrics are named perf/…; docs/metrics.md defines each with its unit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from rlhf.config import RunConfig
from rlhf.data.batches import Rollout, first_with_prompt
from rlhf.distributed import collectives
from rlhf.distributed.micro_batches import tokens_of_minibatch, tokens_of_shards
from rlhf.generation import Sampler
from rlhf.ppo.update import minibatches
from rlhf.profiling.roofline import (
    Machine,
    ModelSize,
    backward_flops,
    forward_flops,
    least_steps,
    measure,
    size_of,
    together,
    tokens_seen,
    wait,
)

PHASES = ("sync", "sampling", "scoring", "update", "evaluation", "checkpoint", "logging", "other")
COMPUTING = ("sampling", "scoring", "update")  # phases whose tokens are counted
ADAM_BYTES = 28  # per weight and step, in float32: reads weight, gradient and two moments, writes all but the gradient


class PhaseTimer:
    """Seconds per phase, and memory at the end of each. Every second since it was made belongs to one phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Drops what was measured; the first iteration starts now."""
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self.started = now
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.overlapped: dict[str, float] = dict.fromkeys(COMPUTING, 0.0)
        self.memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measures a phase. Phases do not overlap; it waits for the device at both ends."""
        wait(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[phase] += time.perf_counter() - start
        self.memory[phase] = max(self.memory.get(phase, 0), memory(self.device))

    def overlap(self, phase: str, seconds: float) -> None:
        """Records seconds of a background task for `phase` during another phase, to which the time belongs."""
        self.overlapped[phase] += seconds

    def close(self) -> dict[str, float]:
        """Metrics of the time since the last call; the next iteration starts now."""
        now = time.perf_counter()
        self.seconds["other"] = now - self.started - sum(self.seconds.values())
        metrics = {f"perf/seconds_{phase}": value for phase, value in self.seconds.items()}
        metrics |= {f"perf/overlapped_seconds_{phase}": value for phase, value in self.overlapped.items()}
        metrics |= {f"perf/memory_{phase}": float(value) for phase, value in self.memory.items()}
        metrics["perf/seconds_iteration"] = now - self.started
        self._begin(now)
        return metrics


def memory(device: torch.device) -> int:
    """Bytes: on CUDA the peak of tensors since the last reset, on a CPU resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def all_machines(device: torch.device, precision: str) -> Machine:
    """The rates of all workers as one machine, measured at the same time, because they share memory. All ranks must
    call it."""
    collectives.barrier()
    return together(collectives.gather_objects(measure(device, precision)))


@dataclass(frozen=True)
class Tokens:
    useful: int
    prompt: int
    padded: int
    dropped: int


@dataclass(frozen=True)
class Work:
    """What a phase computed, over all ranks."""

    tokens: Tokens  # once per row and read, for any number of models
    flops: float  # of all models, for useful and prompt tokens
    bytes: float  # the least that must be read from memory


def work(
    rollout: Rollout,
    sampler: Sampler,
    scoring: Sequence[nn.Module],
    trainable: Sequence[nn.Module],
    config: RunConfig,
    iteration: int,
) -> dict[str, float]:
    """Tokens, FLOPs and bytes of an iteration's phases, as metrics; `rollout` has the rows of all ranks.

    `scoring` are the models that read every response, `trainable` those that are updated. All ranks must call it.
    """
    ppo, response_B, world = config.ppo, rollout.response_mask_BR.sum(1).cpu(), collectives.world_size()
    prompt_B = rollout.mask_BT.sum(1).cpu() - response_B
    P = rollout.mask_BT.shape[1] - rollout.response_mask_BR.shape[1]
    first_B = first_with_prompt(rollout.tokens_BT[:, :P], rollout.mask_BT[:, :P]).cpu()
    shared_B = torch.where(first_B < torch.arange(len(first_B)), prompt_B, 0)
    positions = [sum(of_ranks) for of_ranks in zip(*collectives.gather_objects(sampler.positions), strict=True)]
    steps = list(minibatches(len(response_B), ppo, config.seed, iteration))
    groups = collectives.data_ranks(config.hardware.sequence_parallel)
    read_once = tokens_of_shards(rollout, groups, ppo)
    trained_on = sum(tokens_of_minibatch(rollout, index, groups, ppo) for index in steps)
    lengths, sizes = (prompt_B, response_B, shared_B), [size_of(module) for module in trainable]
    done = {
        "sampling": sampling_work(*lengths, positions, sampler.size, ppo.sampling.batch_size, world),
        "scoring": scoring_work(*lengths, read_once, [size_of(module) for module in scoring], world),
        "update": update_work(*lengths, trained_on, sizes, ppo.epochs, len(steps)),
    }
    metrics: dict[str, float] = {}
    for phase, of_phase in done.items():
        kinds = vars(of_phase.tokens)
        metrics |= {f"perf/tokens_{phase}_{kind}": float(count) for kind, count in kinds.items()}
        metrics[f"perf/token_efficiency_{phase}"] = of_phase.tokens.useful / sum(kinds.values())
        metrics |= {f"perf/flops_{phase}": of_phase.flops, f"perf/bytes_{phase}": of_phase.bytes}
    return metrics


def sampling_work(
    prompt_B: Tensor,
    response_B: Tensor,
    shared_B: Tensor,
    positions: Sequence[int],
    size: ModelSize,
    slots: int,
    world: int,
) -> Work:
    """`positions`: positions that the sampler computed in prompts and in steps. `shared_B`: tokens of a row's prompt
    that were read for another row.

    The last token of a prompt counts as useful, because the first tokens of its responses are drawn there. Bytes:
    weights once per step, in as few steps as `slots` rows at a time allow, and keys and values once per later token.
    """
    stepped_B, (in_prompts, in_steps) = response_B - 1, positions
    stepped, read, drawn_from = int(stepped_B.sum()), int((prompt_B - shared_B).sum()), int((shared_B < prompt_B).sum())
    tokens = Tokens(drawn_from + stepped, read - drawn_from, in_prompts - read, in_steps - stepped)
    steps = sum(1 + least_steps(share, slots) for share in stepped_B.view(world, -1))
    seen = tokens_seen(prompt_B, stepped_B)
    flops = forward_flops(size, prompt_B + stepped_B, drawn_from + stepped, shared_B)
    return Work(tokens, flops, float(steps * size.weight_bytes + seen * size.cache_bytes))


def scoring_work(
    prompt_B: Tensor, response_B: Tensor, shared_B: Tensor, computed: int, sizes: Sequence[ModelSize], world: int
) -> Work:
    """Every model reads every row once, in `computed` positions. Bytes: the weights, once per rank."""
    prompts, responses = int((prompt_B - shared_B).sum()), int(response_B.sum())
    flops = sum(forward_flops(size, prompt_B + response_B, responses, shared_B) for size in sizes)
    tokens = Tokens(responses, prompts, computed - prompts - responses, 0)
    return Work(tokens, flops, float(world * sum(size.weight_bytes for size in sizes)))


def update_work(
    prompt_B: Tensor,
    response_B: Tensor,
    shared_B: Tensor,
    computed: int,
    sizes: Sequence[ModelSize],
    epochs: int,
    steps: int,
) -> Work:
    """Every epoch reads every row, forward and backward, in `computed` positions. Bytes: those of the optimizer."""
    prompts, responses = int((prompt_B - shared_B).sum()), int(response_B.sum())
    asked = (prompt_B + response_B, responses, shared_B)
    flops = sum(forward_flops(size, *asked) + backward_flops(size, *asked) for size in sizes)
    tokens = Tokens(epochs * responses, epochs * prompts, computed - epochs * (prompts + responses), 0)
    return Work(tokens, epochs * flops, float(steps * ADAM_BYTES * sum(size.all_learn for size in sizes)))


def close(timer: PhaseTimer, metrics: Mapping[str, float], machine: Machine) -> dict[str, float]:
    """The times of an iteration, with the speeds and roofline fractions of its `work`."""
    times = timer.close()
    return times | rates(metrics, times, machine)


def rates(metrics: Mapping[str, float], times: Mapping[str, float], machine: Machine) -> dict[str, float]:
    """The speed of each phase and its fraction of the roofline."""
    found = {"perf/machine_flops": machine.flops, "perf/machine_bandwidth": machine.bandwidth}
    for phase in COMPUTING:
        seconds = max(times[f"perf/seconds_{phase}"] + times[f"perf/overlapped_seconds_{phase}"], 1e-9)
        useful, prompt = (metrics[f"perf/tokens_{phase}_{kind}"] for kind in ("useful", "prompt"))
        flops, moved = metrics[f"perf/flops_{phase}"], metrics[f"perf/bytes_{phase}"]
        found |= {
            f"perf/tokens_per_second_{phase}": (useful + prompt) / seconds,
            f"perf/mfu_{phase}": flops / machine.flops / seconds,
            f"perf/roofline_fraction_{phase}": machine.seconds(flops, moved) / seconds,
        }
        if phase == "sampling":
            found["perf/sampled_tokens_per_second"] = metrics["perf/tokens_scoring_useful"] / seconds
    return found
