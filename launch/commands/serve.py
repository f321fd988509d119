"""`rlhf serve`: models behind HTTP."""

from __future__ import annotations

import argparse

from launch.commands.arguments import add_tracking, command, positive, silence_deepspeed


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
        "--queue", type=positive, default=256, metavar="N", help="most responses that wait for a slot (default 256)"
    )
    parser.add_argument(
        "--rate",
        type=int,
        default=1200,
        metavar="N",
        help="most requests of one address in a minute (default 1200; 0: no limit)",
    )
    add_tracking(parser)


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _serve(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.serve.command import run

    return run(args)
