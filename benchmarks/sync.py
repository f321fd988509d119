"""The weight sync of PPO: its seconds and bytes, against gathering one parameter at a time, and its fraction of an
iteration.

    python -m benchmarks.sync --model FOLDER --out sync.json

Both sides fill the sampler's copy from the same policy and take turns, after a warm-up turn. Ours is the
trainer's: shards gathered in buckets. One worker is plain torch without shards, so both only copy; two are ZeRO-3. The
fraction is of whole iterations of `PPOTrainer.step` that follow, after a warm-up iteration.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from benchmarks.turns import in_turns, parser_of, report, table
from benchmarks.worker_group import add_sizes, by_workers, one_iteration
from rlhf.distributed import collectives
from rlhf.distributed.engine import import_deepspeed
from rlhf.ppo.models import Models
from rlhf.ppo.setup import Setup
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.weight_sync import sync_weights
from rlhf.profiling.roofline import wait

ITERATIONS = 3  # whose share of sync is told, after one that is not counted


def one_by_one(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, whole, gathered alone."""
    for name, parameter in module.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        with import_deepspeed().zero.GatheredParameters([parameter]) if sharded else nullcontext():
            yield name, parameter.detach()


def naive_sync(models: Models) -> int:
    weights = one_by_one(models.policy.module)
    return models.sampler.load_weights((name.removeprefix("causal."), tensor) for name, tensor in weights)


def measure(setup: Setup, repeats: int) -> dict[str, Any]:
    """On every rank: (seconds, bytes) of each side and turn, and shares of whole iterations."""

    def timed(sync: Callable[[Models], int]) -> tuple[float, int]:
        collectives.barrier()
        start = time.perf_counter()
        moved = sync(setup.models)
        wait(setup.context.device)
        collectives.barrier()
        return time.perf_counter() - start, moved

    sides = {
        "ours": lambda: timed(lambda models: sync_weights(models.policy, models.sampler)),
        "naive": lambda: timed(naive_sync),
    }
    in_turns(sides, 1)
    turns, trainer, shares = in_turns(sides, repeats), PPOTrainer.of(setup), []
    for _ in range(1 + ITERATIONS):
        times = one_iteration(trainer)
        shares.append((times["perf/seconds_sync"], times["perf/seconds_iteration"]))
    return {"turns": turns, "iterations": shares[1:]}


def summary(workers: int, found: dict[str, Any]) -> dict[str, Any]:
    seconds = {name: statistics.median(turn[0] for turn in turns) for name, turns in found["turns"].items()}
    (moved,) = {turn[1] for turns in found["turns"].values() for turn in turns}  # both move the same
    return {
        "workers": workers,
        "bytes": moved,
        "seconds": seconds,
        "times_faster": seconds["naive"] / seconds["ours"],
        "iteration": statistics.median(whole for _, whole in found["iterations"]),
        "share": statistics.median(part / whole for part, whole in found["iterations"]),
        "found": found,
    }


def shown(results: Sequence[dict[str, Any]]) -> str:
    head = ["workers", "bytes", "in buckets (ours)", "one by one", "times", "iteration", "share of it"]
    return table(
        head,
        [
            [
                str(r["workers"]),
                f"{r['bytes'] / 1e6:.1f} MB",
                f"{r['seconds']['ours'] * 1e3:.0f} ms",
                f"{r['seconds']['naive'] * 1e3:.0f} ms",
                f"{r['times_faster']:.2f}",
                f"{r['iteration']:.2f} s",
                f"{r['share']:.1%}",
            ]
            for r in results
        ],
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = parser_of("sync", __doc__)
    add_sizes(parser, rows=8, length=48)
    args = parser.parse_args(arguments)
    found = by_workers("benchmarks.sync", args, micro_batch=max(args.rows // 2, 1))
    results = [summary(workers, of_workers) for workers, of_workers in found]
    report(args, results, shown(results))
    return results


if __name__ == "__main__":
    main()
