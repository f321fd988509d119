"""`rlhf compare` on the command line. No library is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_arguments(compare: argparse.ArgumentParser) -> None:
    compare.add_argument(
        "runs", metavar="RUN", nargs="+", help="folders such as runs/NAME, or with --tracking names of runs in MLflow"
    )
    compare.add_argument("--tracking", metavar="URI", help="read the runs from this MLflow store or server")
    compare.add_argument("--experiment", default="rlhf", metavar="NAME", help="of MLflow (default rlhf)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="also write compare.html and report.json there")


def handler(hush: Callable[[], None]) -> Callable[[argparse.Namespace, list[str]], int]:
    def compare(args: argparse.Namespace, _: list[str]) -> int:
        hush()
        from launch.compare.compare import compare_runs

        compare_runs(args.runs, args.tracking, args.experiment, args.out)
        return 0

    return compare
