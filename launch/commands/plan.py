"""`rlhf plan`: what a run needs of memory and time, before anything starts."""

from __future__ import annotations

import argparse

from launch.commands.arguments import above_0, command, positive
from launch.commands.runs import takes_settings


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(
        commands, "plan", _plan, "show what a run needs of memory and time; exit code 5 if it does not fit"
    )
    takes_settings(parser, "plan RUNFILE")
    parser.add_argument(
        "--gpu", metavar="NAME", help="the machine, one of configs/machines.yaml (default: this one, else h100-80g)"
    )
    parser.add_argument(
        "--nodes",
        type=positive,
        nargs="+",
        metavar="N",
        help="use all GPUs of so many of these machines; with several numbers, show how an iteration of PPO grows with them",
    )
    parser.add_argument("--price", type=above_0, metavar="$", help="of a GPU for an hour")
    parser.add_argument("--json", action="store_true", help="every part in bytes, for programs")


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from launch.plan.command import run

    return run(args, overrides)
