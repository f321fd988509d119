"""`rlhf promote`: a policy or reward model becomes the champion if it is better."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.arguments import add_tracking, command, silence_deepspeed


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "promote", _promote, "make a model the champion if it is better than the present one")
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a policy or reward model: a folder of a run, models:/NAME@candidate or models:/NAME/3",
    )
    parser.add_argument("--to", choices=("champion",), default="champion", help="the alias (default champion)")
    parser.add_argument("--undo", action="store_true", help="the champion before the present one takes its place again")
    parser.add_argument(
        "--reward",
        metavar="NAME[=REWARD]",
        help="the reward that must rise: one of the candidate's run, or another as for `rlhf evaluate policy` "
        "(default: gold where the run has it, else its first reward)",
    )
    parser.add_argument(
        "--prompts", nargs="+", metavar="FILE", help="default: the held-out prompts that the run reports on"
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="FILE",
        help="of reward models; default: the held-out pairs of the candidate's run",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report (default: beside the artifact)")
    add_tracking(parser)


def _promote(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.promote.command import run

    return run(args)
