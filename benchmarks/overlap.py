"""Seconds of a PPO iteration with its parts in turn, with scoring beside sampling, and with sampling beside the update.

    python -m benchmarks.overlap --model FOLDER --out overlap.json

The ways take turns on the same prompts, after a turn that is not counted. Half of the rows are sampled at a time, so that
answers wait to be scored while others are sampled; none ends before its length, so all ways have as much to do. One
worker is plain torch, two are ZeRO-3; together they have the same threads.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.gang import Rank, add_sizes, by_workers
from benchmarks.turns import in_turns, parser_of, report, table
from rlhf.config import RunConfig
from rlhf.distributed import collectives
from rlhf.ppo.rollout_source import Ahead
from rlhf.ppo.step_profiler import COMPUTING, PHASES, PhaseTimer
from stages.ppo import Models, iterate

WAYS = IN_TURN, BESIDE, AHEAD = "in turn", "scoring beside sampling", "sampling beside the update"
CHUNKS = 4  # in which a worker's answers are scored beside their sampling
SHOWN = ("sync", *COMPUTING)

Turns = Mapping[str, Sequence[Mapping[str, float]]]


def measure(rank: Rank, repeats: int) -> dict[str, list[dict[str, float]]]:
    """On every rank: the clock's figures of each way and turn."""
    iterations: dict[str, int] = dict.fromkeys(WAYS, 0)

    def turn(way: str, config: RunConfig, models: Models) -> dict[str, float]:
        iterations[way] += 1
        collectives.barrier()
        timer, state = PhaseTimer(rank.context.device), {"iteration": iterations[way], "beta": config.ppo.kl_coef}
        iterate(config, rank.context, models, rank.prompts, state, timer)
        return timer.close()

    sides = {
        way: partial(turn, way, settings_of(way, rank.config), dataclasses.replace(rank.models, ahead=Ahead()))
        for way in WAYS
    }
    in_turns(sides, 1)
    return in_turns(sides, repeats)


def settings_of(way: str, config: RunConfig) -> RunConfig:
    ppo, rows = config.ppo, config.ppo.batch_size // config.hardware.workers
    sampling = ppo.sampling.model_copy(update={"batch_size": max(rows // 2, 1), "ahead": way == AHEAD})
    own = {"sampling": sampling, "scoring_chunks": CHUNKS if way == BESIDE else 1}
    return config.model_copy(update={"ppo": ppo.model_copy(update=own)})


def summary(workers: int, found: Turns) -> list[dict[str, Any]]:
    """One line a way: median seconds, those of work beside another phase, and the median over the turns of its iteration
    over that in turn."""
    in_turn = [one["perf/seconds_iteration"] for one in found[IN_TURN]]
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
                "beside": statistics.median(
                    sum(one[f"perf/overlapped_seconds_{p}"] for p in COMPUTING) for one in turns
                ),
                "iteration": statistics.median(whole),
                "of_in_turn": statistics.median(own / other for own, other in zip(whole, in_turn, strict=True)),
            }
        )
    return lines


def shown(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for line in lines:
        seconds = (*line["seconds"].values(), line["other"], line["iteration"], line["beside"])
        cells = [*(f"{value:.2f} s" for value in seconds), f"{line['of_in_turn']:.2f}"]
        rows.append([str(line["workers"]), line["way"], *cells])
    return table(["workers", "way", *SHOWN, "other", "iteration", "beside it", "of in turn"], rows)


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
