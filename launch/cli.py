"""The command `rlhf`: from arguments to an exit code. Its commands are in launch/commands/."""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from launch import signals
from launch.commands import ALL

UNEXPECTED = 1
BAD_DATA, MACHINE_TOO_SMALL = 3, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Codes: rlhf.errors.UserError, 130 after Ctrl-C, 143 after SIGTERM, 1 for a fault of this program."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_settings:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return _guarded(lambda: args.command(args, rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf",
        description="Turn a base model into a chat model: SFT, reward models, PPO or DPO.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for one in ALL:
        one.add(commands)
    return parser


def _guarded(command: Callable[[], int]) -> int:
    """The one place where an exception becomes a message and an exit code."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _complain("interrupted")
        return 128 + signals.interrupted_by()
    except BrokenPipeError:  # `rlhf config … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  people get a message, the traceback goes to a file
        return _explain(error)


def _explain(error: Exception) -> int:
    from reward_data import DataError
    from rlhf.errors import UserError

    if os.environ.get("RLHF_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, UserError):
        _complain(error.message)
        return error.exit_code
    if isinstance(error, DataError):
        _complain(error.message)
        return BAD_DATA
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _complain(f"the disk is full{f': {error.filename}' if error.filename else ''}; free some space and run again")
        return MACHINE_TOO_SMALL
    _complain(f"unexpected {type(error).__name__}: {error}\n{_keep_traceback(error)}")
    return UNEXPECTED


def _keep_traceback(error: Exception) -> str:
    from rlhf.config import without_secrets

    try:
        with tempfile.NamedTemporaryFile("w", prefix="rlhf-", suffix=".traceback.txt", delete=False) as file:
            file.write(without_secrets("".join(traceback.format_exception(error))))
    except OSError as failure:
        return f"No traceback could be kept ({failure.strerror}); RLHF_DEBUG=1 shows it here."
    return f"The traceback is in {file.name}; RLHF_DEBUG=1 shows it here."


def _complain(message: str) -> None:
    from rlhf.config import without_secrets

    text = f"error: {without_secrets(message)}"
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[31m{text}\033[0m" if coloured else text, file=sys.stderr)


def command_line() -> NoReturn:
    """What the shell starts. Where torch is loaded the interpreter is not taken apart: a thread that still computes, of a
    process group or of a late reward function, would abort the process ("terminate called without an active exception").
    """
    code = main()
    if "torch" in sys.modules:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command_line()
