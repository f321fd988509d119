"""The time of a stage from the command to its first step, by part.

    python -m benchmarks.startup --model FOLDER --out startup.json

It runs `rlhf stage …` on a private Ray, each stage on the artifacts before it; a repeat is a new run. The times are
those of files that every run writes:

driver  the command reads settings and data, and starts Ray          until made_by.json
group   Ray Train starts the workers, and they form their group       until logs/
import  the worker imports what a stage needs                         until the first line of events.jsonl
step    data, model, engines, checks; PPO also answers its held-out
        prompts; then the first step, until its figures are recorded  first step in metrics.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shapes import given_or_random
from benchmarks.turns import device_of, parser_of, report, settings, table
from launch.settings import dump
from rlhf.config import (
    DataConfig,
    HardwareConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RoleConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
    SourceConfig,
    TrackingConfig,
)
from rlhf.errors import UserError

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward/reward", "ppo")
PARTS = ("driver", "group", "import", "step")


def run_settings(args: argparse.Namespace, model: Path, folder: Path) -> RunConfig:
    """A few rows and one or two steps of each stage; MLflow follows, as it does by default, unless `--quick`."""
    steps: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "epochs": 2.0, "max_length": 256, "evals": 1}
    steps |= {"checkpoints": 0}
    cuda = device_of(args.device).type == "cuda"
    threads = max(args.threads // args.workers, 1)
    sampling = SamplingConfig(max_new_tokens=8)
    config = settings(
        args,
        model,
        folder,
        8,
        sft=SFTConfig(**steps, packing=False),
        reward=RewardConfig(models={"reward": RewardModelConfig(own_tag="helpful")}, center_rows=4, **steps),
        ppo=PPOConfig(iterations=1, batch_size=4, minibatch_size=4, sampling=sampling, eval_prompts=4),
        hardware=HardwareConfig(
            workers=args.workers,
            cpus_per_worker=threads,
            gpus_per_worker=1 if cuda else 0,
            precision=args.precision,
        ),
    )
    role = RoleConfig(
        train=[SourceConfig(path="shipped", limit=16)],
        held_out=[SourceConfig(path="shipped", split="held_out", limit=8)],
    )
    uri = None if args.quick else f"sqlite:///{folder / 'mlflow.db'}"
    data = DataConfig(demonstrations=role, preferences=role, prompts=role, shared_prompts="drop")
    return config.model_copy(update={"data": data, "tracking": TrackingConfig(uri=uri)}).with_fitting_micro_batches()


def launch(config: RunConfig, stage: str, threads: int) -> dict[str, float]:
    """Seconds of each part. UserError (5) with what the command said where it fails."""
    config.folder.mkdir(parents=True, exist_ok=True)
    runfile = config.folder / "run.yaml"
    runfile.write_text(dump(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    start = time.time()
    command = [sys.executable, "-m", "launch.cli", "stage", stage, str(runfile)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{stage} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}", 5)
    return parts(start, config.folder / stage)


def parts(start: float, folder: Path) -> dict[str, float]:
    """Seconds from `start` (since 1970) to the first step of the stage in `folder`, part by part."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    marks = [
        start,
        (folder / "made_by.json").stat().st_mtime,
        (folder / "logs").stat().st_mtime,  # the log of the last rank is opened
        events[0]["time"],
        next(line["time"] for line in metrics if line["step"] >= 1),
    ]
    return {part: after - before for part, before, after in zip(PARTS, marks, marks[1:], strict=False)}


def summary(stage: str, turns: Sequence[dict[str, float]]) -> dict[str, Any]:
    medians = {part: statistics.median(turn[part] for turn in turns) for part in PARTS}
    return {"stage": stage, "total": statistics.median(sum(turn.values()) for turn in turns), "parts": medians} | {
        "turns": list(turns)
    }


def shown(results: Sequence[dict[str, Any]]) -> str:
    head = ["stage", "command to first step", *PARTS]
    return table(
        head,
        [[r["stage"], f"{r['total']:.1f} s", *(f"{r['parts'][part]:.1f} s" for part in PARTS)] for r in results],
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = parser_of("startup", __doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="a stage needs those before it")
    args = parser.parse_args(arguments)
    turns: dict[str, list[dict[str, float]]] = {stage: [] for stage in args.stages}
    with tempfile.TemporaryDirectory() as folder:
        model = given_or_random(args.model, "tiny" if args.quick else args.shape, Path(folder))
        for repeat in range(args.repeats):
            config = run_settings(args, model, Path(folder) / str(repeat))
            for stage in args.stages:
                turns[stage].append(launch(config, stage, max(args.threads // args.workers, 1)))
                print(f"{repeat + 1}: {stage} {sum(turns[stage][-1].values()):.1f} s", flush=True)
    results = [summary(stage, of_stage) for stage, of_stage in turns.items()]
    report(args, results, shown(results))
    return results


if __name__ == "__main__":
    main()
