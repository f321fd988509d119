"""Seconds of a PPO iteration with its phases one after another, and with sampling during the update.

    python -m benchmarks.overlap --model FOLDER --out overlap.json

The two take turns on the same prompts, after a warm-up turn. No response ends early, so both have the same work. One
worker is plain torch, two are ZeRO-3; together they have the same threads.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.turns import in_turns, parser_of, report, table
from benchmarks.worker_group import add_sizes, by_workers, one_iteration
from rlhf.ppo.setup import Setup
from rlhf.ppo.step_profiler import COMPUTING, PHASES
from rlhf.ppo.trainer import PPOTrainer

WAYS = ON_POLICY, OFF_POLICY = "on-policy", "one step off-policy"
SHOWN = ("sync", *COMPUTING)

Turns = Mapping[str, Sequence[Mapping[str, float]]]


def measure(setup: Setup, repeats: int) -> dict[str, list[dict[str, float]]]:
    """On every rank: the metrics of each way and turn."""
    sides = {way: partial(one_iteration, PPOTrainer.of(set_up(setup, way))) for way in WAYS}
    in_turns(sides, 1)
    return in_turns(sides, repeats)


def set_up(setup: Setup, way: str) -> Setup:
    ppo = setup.config.ppo
    sampling = ppo.sampling.model_copy(update={"one_step_off_policy": way == OFF_POLICY})
    config = setup.config.model_copy(update={"ppo": ppo.model_copy(update={"sampling": sampling})})
    return dataclasses.replace(setup, config=config)


def summary(workers: int, found: Turns) -> list[dict[str, Any]]:
    """A line per variant: median seconds, those of sampling during the update, and the median ratio to the on-policy
    iteration."""
    on_policy = [one["perf/seconds_iteration"] for one in found[ON_POLICY]]
    lines = []
    for way, turns in found.items():
        whole = [one["perf/seconds_iteration"] for one in turns]
        medians = {phase: statistics.median(one[f"perf/seconds_{phase}"] for one in turns) for phase in PHASES}
        lines.append(
            {
                "workers": workers,
                "way": way,
                "seconds": {phase: medians[phase] for phase in SHOWN},
                "other": sum(seconds for phase, seconds in medians.items() if phase not in SHOWN),
                "overlapped": statistics.median(one["perf/overlapped_seconds_sampling"] for one in turns),
                "iteration": statistics.median(whole),
                "of_on_policy": statistics.median(own / other for own, other in zip(whole, on_policy, strict=True)),
            }
        )
    return lines


def shown(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for line in lines:
        seconds = (*line["seconds"].values(), line["other"], line["iteration"], line["overlapped"])
        cells = [*(f"{value:.2f} s" for value in seconds), f"{line['of_on_policy']:.2f}"]
        rows.append([str(line["workers"]), line["way"], *cells])
    return table(["workers", "way", *SHOWN, "other", "iteration", "overlapped", "of on-policy"], rows)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = parser_of("overlap", __doc__)
    add_sizes(parser, rows=16, length=48)
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of a pass per worker (default 4)")
    args = parser.parse_args(arguments)
    raw = dict(by_workers("benchmarks.overlap", args, args.micro_batch))
    lines = [line for workers, turns in raw.items() for line in summary(workers, turns)]
    report(args, {"table": lines, "turns": raw}, shown(lines))
    return lines


if __name__ == "__main__":
    main()
