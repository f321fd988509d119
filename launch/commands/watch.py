"""`rlhf watch`: how a served model does over time."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.arguments import above_0, add_tracking, command, silence_deepspeed


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "watch", _watch, "watch rewards, safety, refusals, latency and drift of a served model")
    parser.add_argument(
        "--store", default="feedback", metavar="FOLDER|URL", help="as `rlhf serve` says (default: feedback/ here)"
    )
    parser.add_argument("--since", type=_span, default="24h", metavar="TIME", help="30m, 24h or 7d (default 24h)")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="DIR",
        help="folder of `rlhf evaluate policy`, of `rlhf promote` or of a run, from which drift is measured "
        "(default: the promotion in the run's folder, else its held-out responses)",
    )
    parser.add_argument("--rules", type=Path, metavar="FILE", help="alarms: metric, op, value, window; a webhook")
    parser.add_argument(
        "--every", type=above_0, default=60.0, metavar="S", help="seconds between two looks (default 60)"
    )
    parser.add_argument("--once", action="store_true", help="look once and end")
    add_tracking(parser)


def _span(text: str) -> float:
    from rlhf.serving.watch.spans import seconds

    try:
        return seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _watch(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.serve.command import check_installed

    check_installed()
    from launch.watch.command import run

    return run(args)
