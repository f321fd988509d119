"""The common part of benchmarks: arguments, settings of a run, sides that take turns, a table and a JSON record."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.shapes import SHAPES
from rlhf.config import (
    DataConfig,
    HardwareConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RoleConfig,
    RunConfig,
    SourceConfig,
    TrackingConfig,
)

Result = TypeVar("Result")


def parser_of(module: str, description: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """The arguments that every benchmark of a model has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", help="a model folder")
    subject.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], help="of random weights")
    subject.add_argument("--quick", action="store_true", help="a tiny random model: does it work?")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"the median counts (default {repeats})")
    out = Path(f"{module}.json")
    parser.add_argument("--out", type=Path, default=out, help=f"file for every figure (default {out})")
    return parser


def device_of(name: str) -> torch.device:
    """`auto`: CUDA where there is one. On CUDA the device of this rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def name_of(device: torch.device, threads: int) -> str:
    """As people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads"


def settings(args: argparse.Namespace, model: Path, folder: Path, rows: int, **sections: Any) -> RunConfig:
    """A run on `rows` shipped rows of each kind, with one reward model and without MLflow."""
    shipped = RoleConfig(train=[SourceConfig(path="shipped", limit=rows)])
    one_model = {"helpfulness_model": "reward", "safety_model": "reward"}
    given: dict[str, Any] = {
        "hardware": HardwareConfig(precision=args.precision),
        "reward": RewardConfig(models={"reward": RewardModelConfig(own_tag="helpful")}),
        "ppo": PPOConfig(),
    } | sections
    return RunConfig(
        name="benchmark",
        runs_dir=folder,
        model=ModelConfig(path=str(model)),
        data=DataConfig(demonstrations=shipped, preferences=shipped, prompts=shipped, shared_prompts="drop"),
        tracking=TrackingConfig(uri=None),
        **given | {"ppo": given["ppo"].model_copy(update=one_model)},
    )


def in_turns(sides: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """Runs every side once, `repeats` times, so that a machine that slows down slows all of them."""
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            results[name].append(side())
    return results


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(args: argparse.Namespace, results: Any, shown: str) -> None:
    """Prints where it ran and the table, and writes all results to `--out`."""
    name = name_of(device_of(args.device), args.threads)
    subject = args.model or f"random weights, shape {'tiny' if args.quick else args.shape}"
    print(f"\ndevice: {name}; model: {subject}; {args.precision}; median of {args.repeats}\n\n{shown}")
    record = {
        "torch": torch.__version__,
        "processor": platform.processor(),
        "device": name,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{args.out} holds all figures")
