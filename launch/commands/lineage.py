"""`rlhf lineage`: what a model was made from."""

from __future__ import annotations

import argparse

from launch.commands.arguments import add_tracking, command


def add(commands: argparse._SubParsersAction) -> None:
    lineage = command(commands, "lineage", _lineage, "what a model was made from, back to the data")
    lineage.add_argument("model", metavar="MODEL", help="a folder of a run, models:/NAME@ALIAS or models:/NAME/3")
    add_tracking(lineage)


def _lineage(args: argparse.Namespace, _: list[str]) -> int:
    from launch.lineage.command import lineage

    return lineage(args.model, args.tracking_uri)
