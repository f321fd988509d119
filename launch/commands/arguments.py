"""What several commands have in common: their parser, and arguments with one meaning everywhere."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

Handler = Callable[[argparse.Namespace, list[str]], int]
"""The arguments and, where the command takes settings, those after RUNFILE → the exit code."""


def command(commands: argparse._SubParsersAction, name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(command=handler, takes_settings=False)
    return parser


def add_tracking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        default="sqlite:///mlflow.db",
        help="where MLflow keeps the metrics (default sqlite:///mlflow.db); null: only files are written",
    )


def tracking_uri(args: argparse.Namespace) -> str | None:
    return None if args.tracking_uri == "null" else args.tracking_uri


def add_scoring(parser: argparse.ArgumentParser, batch_size: int = 16) -> None:
    parser.add_argument(
        "--batch-size", type=positive, default=batch_size, metavar="N", help=f"texts at once (default {batch_size})"
    )
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--bad-rows", choices=("refuse", "skip"), default="refuse", help="default refuse")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def above_0(text: str) -> float:
    if (value := not_negative(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def silence_deepspeed() -> None:
    """DeepSpeed, which transformers imports, warns on stdout where it finds no GPU and nobody says so."""
    if not any(Path(driver).exists() for driver in ("/proc/driver/nvidia", "/dev/kfd")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
