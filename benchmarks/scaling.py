"""How time and memory of a PPO iteration grow with its rows and with the length of its responses, on one worker and
two.

    python -m benchmarks.scaling --model FOLDER --out scaling.json

Every size is one iteration of `PPOTrainer.step`, from weight sync to the last optimizer step: one epoch, one minibatch,
forward passes of `--micro-batch` rows. No response ends early. The sizes take turns in one process per worker, after a
warm-up iteration. One worker is plain torch, two are ZeRO-3; together they have the same threads. Memory is the largest
resident size during an iteration (on CUDA: of tensors), of all workers together.

exponent: the slope of log time over log size, by least squares; 1 is proportional.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.side import peak_memory
from benchmarks.turns import parser_of, report, table
from benchmarks.worker_group import add_sizes, by_workers, one_iteration
from rlhf.distributed import collectives
from rlhf.ppo.setup import Setup, reward_set
from rlhf.ppo.trainer import PPOTrainer

FACTORS = (1, 2, 4)
SIZES = tuple(dict.fromkeys([*((factor, 1) for factor in FACTORS), *((1, factor) for factor in FACTORS)]))
"""(times the rows, times the length) of every iteration that is measured."""
SHOWN = ("sync", "sampling", "scoring", "update", "iteration")


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the power law a · size^b that is nearest in logarithms."""
    logs = ([math.log(value) for value in series] for series in (sizes, values))
    return statistics.linear_regression(*logs).slope


def grown(setup: Setup, rows: int, length: int) -> Setup:
    ppo = setup.config.ppo
    sampling = ppo.sampling.model_copy(
        update={
            "max_new_tokens": ppo.sampling.max_new_tokens * length,
            "batch_size": ppo.sampling.batch_size * rows,
        }
    )
    sizes = {"batch_size": ppo.batch_size * rows, "minibatch_size": ppo.batch_size * rows, "sampling": sampling}
    config = setup.config.model_copy(update={"ppo": ppo.model_copy(update=sizes)})
    return dataclasses.replace(setup, config=config, rewards=reward_set(config, setup.models))


def measure(setup: Setup, repeats: int) -> list[dict[str, Any]]:
    """On every rank: seconds by phase and bytes, of each size and turn."""
    found: list[dict[str, Any]] = [{"rows": rows, "length": length, "turns": []} for rows, length in SIZES]
    trainers = [PPOTrainer.of(grown(setup, *size)) for size in SIZES]
    _turn(trainers[0])
    for _ in range(repeats):
        for of_size, trainer in zip(found, trainers, strict=True):
            of_size["turns"].append(_turn(trainer))
    return found


def _turn(trainer: PPOTrainer) -> dict[str, float]:
    collectives.barrier()
    _forget_peak()
    metrics = one_iteration(trainer)
    found = {phase: metrics[f"perf/seconds_{phase}"] for phase in SHOWN}
    on_device = max(value for name, value in metrics.items() if name.startswith("perf/memory_"))
    mine = on_device if trainer.context.device.type == "cuda" else peak_memory()
    return found | {"bytes": float(sum(collectives.gather_objects(mine))), "answer_tokens": metrics["ppo/length"]}


def _forget_peak() -> None:
    """The largest resident size begins again (Linux, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def summary(workers: int, sizes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per phase and for memory: medians at every size, and how they grow."""
    lines = []
    for figure in (*SHOWN, "bytes"):
        medians = {(s["rows"], s["length"]): statistics.median(turn[figure] for turn in s["turns"]) for s in sizes}
        by_rows, by_length = [medians[f, 1] for f in FACTORS], [medians[1, f] for f in FACTORS]
        lines.append(
            {
                "workers": workers,
                "figure": figure,
                "by_rows": by_rows,
                "by_length": by_length,
                "exponent_rows": exponent(FACTORS, by_rows),
                "exponent_length": exponent(FACTORS, by_length),
            }
        )
    return lines


def shown(lines: Sequence[Mapping[str, Any]]) -> str:
    times = [f"× {factor}" for factor in FACTORS[1:]]
    head = ["workers", "", "smallest", *(f"rows {t}" for t in times), "exponent"]
    head += [*(f"length {t}" for t in times), "exponent"]
    rows = []
    for line in lines:
        memory = line["figure"] == "bytes"
        unit, scale = ("GB", 1e-9) if memory else ("s", 1.0)
        by_rows, by_length = ([f"{v * scale:.2f} {unit}" for v in line[by]] for by in ("by_rows", "by_length"))
        powers = [f"{line[name]:.2f}" for name in ("exponent_rows", "exponent_length")]
        name = "memory" if memory else line["figure"]
        rows.append([str(line["workers"]), name, *by_rows, powers[0], *by_length[1:], powers[1]])
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = parser_of("scaling", __doc__)
    add_sizes(parser, rows=2, length=16)
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of a pass per worker (default 1)")
    args = parser.parse_args(arguments)
    raw = dict(by_workers("benchmarks.scaling", args, args.micro_batch))
    lines = [line for workers, sizes in raw.items() for line in summary(workers, sizes)]
    report(args, {"table": lines, "turns": raw}, shown(lines))
    return lines


if __name__ == "__main__":
    main()
