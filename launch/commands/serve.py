"""`rlhf serve`: models behind HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.arguments import above_0, add_tracking, command, not_negative, positive, silence_deepspeed


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "serve", _serve, "serve models over HTTP, as OpenAI's interface has it")
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a policy's folder, a model's folder or hub name, or NAME@ALIAS of the registry; the first is the default",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; any other demands RLHF_SERVE_TOKEN")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="default 8000")
    parser.add_argument(
        "--system-prompt", default="", metavar="TEXT", help="the system message of dialogues that have none"
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=1024, metavar="N", help="most tokens of a response (default 1024)"
    )
    parser.add_argument(
        "--engine", choices=("own", "vllm"), default="own", help="what samples (default own; vllm: make vllm)"
    )
    parser.add_argument(
        "--queue", type=positive, default=256, metavar="N", help="most responses that wait for a slot (default 256)"
    )
    parser.add_argument(
        "--rate",
        type=int,
        default=1200,
        metavar="N",
        help="most requests of one address in a minute (default 1200; 0: no limit)",
    )
    _add_store(parser)
    _add_guard(parser)
    _add_replicas(parser)
    add_tracking(parser)
    _add_feedback(commands)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        metavar="FOLDER|URL",
        help="where exchanges and votes are kept: a folder, sqlite:///…, postgresql://…, or none "
        "(default: feedback/ in the run's folder, else here)",
    )
    parser.add_argument("--keep-days", type=above_0, metavar="N", help="delete older exchanges (default: keep all)")
    parser.add_argument(
        "--redact", action="store_true", help="keep no mail addresses, telephone and card numbers, IBANs, IP addresses"
    )
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="a reward model that scores what is kept, behind the requests; may be repeated; none: no scores "
        "(default: those of the run that made the policy)",
    )


def _add_guard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guard", metavar="MODEL", help="a safety model that judges prompts and responses")
    parser.add_argument(
        "--guard-threshold",
        type=_fraction,
        metavar="P",
        help="unsafe is what is safe with a probability below it (default 0.15)",
    )
    parser.add_argument(
        "--guard-action",
        choices=("annotate", "refuse", "regenerate"),
        help="what becomes of unsafe responses (default refuse); unsafe prompts are refused but by annotate",
    )


def _add_replicas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replicas", type=positive, default=1, metavar="N", help="processes that share the work, on Ray (default 1)"
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a cluster for the replicas (default: a private Ray on this machine)",
    )


def _add_feedback(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "feedback", _feedback, "what people said and thought of served models")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    delete = actions.add_parser("delete", help="forget a person", allow_abbrev=False)
    delete.add_argument("--user", required=True, metavar="NAME", help="as in `user` of their requests and votes")
    export = actions.add_parser("export", help="write votes as data for training", allow_abbrev=False)
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the files")
    export.add_argument(
        "--held-out", type=_fraction, default=0.1, metavar="F", help="fraction of the groups held out (default 0.1)"
    )
    report = actions.add_parser("report", help="say how far the votes can be trusted", allow_abbrev=False)
    for each in (delete, export, report):
        each.add_argument("--store", default="feedback", metavar="FOLDER|URL", help="default: feedback/ here")


def _feedback(args: argparse.Namespace, _: list[str]) -> int:
    from launch.serve.feedback import run

    return run(args)


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _fraction(text: str) -> float:
    if (value := not_negative(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _serve(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.serve.command import run

    return run(args)
