"""A training stage against a bare torch loop: the common part of `benchmarks.sft` and `benchmarks.reward`.

Ours is the stage's own `main` in this process, without Ray, stopped after its steps. Its time is measured between the
metrics of its steps, so it includes rows, records and progress. The bare loop is forward, backward, gradient clipping
and AdamW over the batches that the stage's Trainer made, ready in memory. In a first turn, which is not timed, both
must reach the same losses, step by step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import given_or_random
from benchmarks.turns import device_of, in_turns, report, settings, table
from rlhf.config import OptimConfig, RewardConfig, RewardModelConfig, RunConfig, SFTConfig
from rlhf.distributed.engine import build_optimizer
from rlhf.errors import UserError
from rlhf.profiling.roofline import wait
from rlhf.runs.artifacts import Artifact
from rlhf.runs.context import Progress, StageContext
from rlhf.tracking import NullTracker, Tracker, open_tracker
from stages.base import stage_of

OPTIM = OptimConfig(lr=1e-4)  # large enough that a different step shows in the next loss
TOLERANCE = {"float32": 1e-4, "bf16": 3e-2}  # relative; rounding grows with every step
Batch = dict[str, Tensor]  # of one forward pass, as the stage's model gets it


@dataclass(frozen=True)
class Stage:
    """How one stage is called, and what the same is without it."""

    name: str
    loss: str  # its figure of every step
    trainer: type  # whose batches are read
    main: Callable[[RunConfig, StageContext], Artifact]
    load: Callable[[Path], nn.Module]  # what the bare loop trains
    loss_of: Callable[[nn.Module, Sequence[Batch]], Iterator[Tensor]]  # parts of a step's loss, one per forward pass
    tokens: Callable[[Batch], int]


@dataclass(frozen=True)
class Turn:
    seconds: list[float]  # of each step after the first
    losses: list[float]


class Done(Exception):
    """The stage has made its steps."""


class Stopwatch(NullTracker):
    """Notes when the stage told the loss of a step, and leaves it after the last; what it is told `tracker` records."""

    def __init__(self, tracker: Tracker, loss: str, steps: int) -> None:
        self.tracker, self.loss, self.steps = tracker, loss, steps
        self.marks: list[float] = []
        self.losses: list[float] = []

    def metrics(self, values: Any, step: int) -> None:
        self.tracker.metrics(values, step)
        if self.loss not in values:
            return
        self.marks.append(time.perf_counter())
        self.losses.append(values[self.loss])
        if step == self.steps:
            raise Done


def turn(marks: Sequence[float], losses: Sequence[float]) -> Turn:
    """Of steps that ended at these times; when the first began is not known."""
    gc.collect()  # a Trainer has reference cycles and holds its model
    return Turn([end - start for start, end in pairwise(marks)], list(losses))


def stage_settings(args: argparse.Namespace, model: Path, folder: Path) -> RunConfig:
    """No checkpoints, and no evaluation before the last step, which is never reached."""
    sizes: dict[str, Any] = {
        "epochs": float(args.steps + 1),  # whole batches, so each has one step at least
        "batch_size": args.batch,
        "micro_batch_size": args.micro_batch,
        "max_length": args.max_length,
        "optim": OPTIM,
        "evals": 1,
        "checkpoints": 0,
    }
    models = {"reward": RewardModelConfig(own_tag="helpful")}
    stages = {"sft": SFTConfig(**sizes, packing=args.packing), "reward": RewardConfig(models=models, **sizes)}
    return settings(args, model, folder, args.rows, **stages)


def ours(stage: Stage, config: RunConfig, device: torch.device, steps: int) -> Turn:
    folder = config.folder / stage.name
    tracker = open_tracker(folder, config.tracking, stage.name, parent_run_id=None, is_writer=True)
    watch = Stopwatch(tracker, stage.loss, steps)
    inputs = {"sft": Artifact("sft", Path(config.model.path), "", {}, "", "", {})}
    progress = Progress(folder, is_writer=True)
    try:
        roles = stage_of(stage.name).roles
        stage.main(config, StageContext(stage.name, 0, 1, device, folder, inputs, watch, progress, True, roles))
    except Done:
        pass
    finally:
        tracker.close()
    return turn(watch.marks, watch.losses)


def bare(stage: Stage, config: RunConfig, device: torch.device, batches: Sequence[Sequence[Batch]]) -> Turn:
    model = stage.load(Path(config.model.path)).to(device).train()
    optimizer = build_optimizer(model, OPTIM)
    marks, losses = [], []
    for passes in batches:
        total = 0.0
        parts = stage.loss_of(model, passes)
        for _ in passes:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.hardware.precision == "bf16"):
                loss = next(parts)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        marks.append(time.perf_counter())
        losses.append(total)
    return turn(marks, losses)


@contextmanager
def recorded(trainer: type, passes_per_step: int) -> Iterator[list[list[Batch]]]:
    """Collects the batches that the trainer hands to its loss, by step."""
    steps: list[list[Batch]] = []
    compute_loss = trainer.compute_loss  # type: ignore[attr-defined]

    def record(self: Any, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        if not steps or len(steps[-1]) == passes_per_step:
            steps.append([])
        steps[-1].append({name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)})
        return compute_loss(self, model, inputs, *args, **kwargs)

    trainer.compute_loss = record  # type: ignore[attr-defined]
    try:
        yield steps
    finally:
        trainer.compute_loss = compute_loss  # type: ignore[attr-defined]


def check_losses(one: Sequence[float], other: Sequence[float], tolerance: float) -> float:
    """The largest relative difference. UserError (6) if the two differ."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))
    if worst > tolerance:
        raise UserError(f"the two sides do not compute the same: losses {one} and {other}", 6)
    return worst


def compare(stage: Stage, args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    device = device_of(args.device)
    with recorded(stage.trainer, args.batch // args.micro_batch) as batches:
        first = ours(stage, config, device, args.steps)
    difference = check_losses(
        first.losses, bare(stage, config, device, batches).losses, TOLERANCE[config.hardware.precision]
    )
    sides = {
        "bare": lambda: bare(stage, config, device, batches),
        "ours": lambda: ours(stage, config, device, args.steps),
    }
    turns = in_turns(sides, args.repeats)
    tokens = sum(stage.tokens(batch) for passes in batches[1:] for batch in passes)
    positions = sum(batch["input_ids"].numel() for passes in batches[1:] for batch in passes)
    rates = {name: [tokens / sum(turn.seconds) for turn in of_side] for name, of_side in turns.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "stage": stage.name,
        "precision": config.hardware.precision,
        "steps": args.steps - 1,
        "tokens_per_step": tokens / (args.steps - 1),
        "padding": 1 - tokens / positions,
        "tokens_per_second": rates,
        "median": medians,
        "share_of_bare": statistics.median(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)),
        "losses": first.losses,
        "loss_difference": difference,
    }


def shown(result: dict[str, Any]) -> str:
    head = [
        "stage",
        "tokens a step",
        "padding",
        "bare loop, tokens/s",
        "ours, tokens/s",
        "ours / bare",
        "losses differ by",
    ]
    medians = result["median"]
    row = [
        result["stage"],
        f"{result['tokens_per_step']:.0f}",
        f"{result['padding']:.2f}",
        f"{medians['bare']:.0f}",
        f"{medians['ours']:.0f}",
        f"{result['share_of_bare']:.2f}",
        f"{result['loss_difference']:.0e}",
    ]
    return table(head, [row])


def run(stage: Stage, args: argparse.Namespace) -> dict[str, Any]:
    """Compares, prints and records."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = given_or_random(args.model, "tiny" if args.quick else args.shape, Path(folder))
        result = compare(stage, args, stage_settings(args, model, Path(folder)))
    report(args, result, shown(result))
    return result


def add_sizes(parser: argparse.ArgumentParser, batch: int, micro_batch: int, max_length: int, rows: int) -> None:
    parser.add_argument(
        "--steps", type=int, default=5, help="of the optimizer per turn, the first not timed (default 5)"
    )
    parser.add_argument("--batch", type=int, default=batch, help=f"rows of a step (default {batch})")
    parser.add_argument("--micro-batch", type=int, default=micro_batch, help=f"of a pass (default {micro_batch})")
    parser.add_argument("--max-length", type=int, default=max_length, help=f"tokens of a row (default {max_length})")
    parser.add_argument("--rows", type=int, default=rows, help=f"of the shipped data (default {rows})")
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True, help="of SFT (default: yes)")
