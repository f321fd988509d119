"""`rlhf sweep`: runs over a grid of settings and seeds."""

from __future__ import annotations

import argparse

from launch.commands.arguments import command, positive, silence_deepspeed
from launch.commands.runs import takes_settings


def add(commands: argparse._SubParsersAction) -> None:
    sweep = command(
        commands, "sweep", _sweep, "runs over a grid of settings and seeds, side by side, and compares them"
    )
    takes_settings(sweep, "sweep RUNFILE --SETTING VALUE VALUE …")
    sweep.add_argument(
        "--seeds",
        type=positive,
        default=1,
        metavar="N",
        help="each cell with N seeds, from the run file's on (default 1)",
    )


def _sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    silence_deepspeed()
    from launch.sweep.sweep import sweep

    return sweep(args.runfile, overrides, args.seeds)
