"""`rlhf compare`: runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.arguments import command, silence_deepspeed, tracking_uri


def add(commands: argparse._SubParsersAction) -> None:
    compare = command(commands, "compare", _compare, "runs side by side: settings, results, curves")
    compare.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="folders such as runs/NAME, or with --tracking-uri names of runs in MLflow",
    )
    compare.add_argument("--tracking-uri", metavar="URI", help="read the runs from this MLflow store or server")
    compare.add_argument("--tracking", dest="renamed", help=argparse.SUPPRESS)
    compare.add_argument("--experiment", default="rlhf", metavar="NAME", help="of MLflow (default rlhf)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="also write compare.html and report.json there")


def _compare(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.compare.compare import compare_runs
    from rlhf.errors import UserError

    if args.renamed is not None:
        raise UserError(f"--tracking is renamed to --tracking-uri {args.renamed}")
    compare_runs(args.runs, tracking_uri(args), args.experiment, args.out)
    return 0
