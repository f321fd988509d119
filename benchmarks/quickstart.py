"""The quickstart under torchrun: all GPUs of this machine, NCCL, ZeRO-3, bf16.

    python -m benchmarks.quickstart --out quickstart.json

Each stage is a command of its own, as people give it. `--quick`: tests/smoke.yaml on two CPU ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.turns import table
from rlhf.runs import artifacts

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "reward", "ppo")
QUICK = {"sft.epochs": "1", "reward.epochs": "1", "ppo.iterations": "1"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    ranks = 2 if args.quick else torch.cuda.device_count()
    if not ranks:
        raise SystemExit("there is no GPU here; --quick runs a small pipeline on two CPU ranks")
    with tempfile.TemporaryDirectory() as folder:
        seconds = {stage: run(stage, ranks, args.quick, Path(folder)) for stage in STAGES}
        results = {"ranks": ranks, "seconds": seconds, "metrics": metrics_of(Path(folder) / "torchrun")}
    print(table(["stage", "seconds"], [[stage, f"{spent:.0f}"] for stage, spent in seconds.items()]))
    args.out.write_text(json.dumps({"results": results}, indent=1) + "\n")
    return results


def run(stage: str, ranks: int, quick: bool, folder: Path) -> float:
    """Seconds of the command. CalledProcessError where it failed."""
    runfile = str(ROOT / "tests/smoke.yaml") if quick else "quickstart"
    hardware = (
        {} if quick else {"hardware.gpus_per_worker": "1", "hardware.precision": "bf16", "hardware.zero_stage": "3"}
    )
    own = {"name": "torchrun", "runs_dir": str(folder), "tracking.uri": "null", "hardware.workers": str(ranks)}
    settings = own | hardware | (QUICK if quick else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "launch.cli"]
    command += ["stage", stage, runfile, *(word for name, value in settings.items() for word in (f"--{name}", value))]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return time.perf_counter() - start


def metrics_of(folder: Path) -> dict[str, Any]:
    """Of every artifact, by its stage."""
    found = sorted(folder.rglob(artifacts.MANIFEST))
    return {str(path.parents[1].relative_to(folder)): artifacts.load(path.parent).metrics for path in found}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small pipeline on two CPU ranks: does it work?")
    parser.add_argument("--out", type=Path, default=Path("quickstart.json"), help="(default %(default)s)")
    return parser


if __name__ == "__main__":
    main()
