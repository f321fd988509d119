"""The command `rlhf`. No library is imported here, so that `--help` is there at once."""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from launch.compare import arguments as compare
from launch.promote import arguments as promote_arguments
from stages.base import STAGES, parts_of

STAGE_HELP = f"{', '.join(STAGES)}; reward/NAME is one reward model"
SETTINGS_HELP = (
    "After RUNFILE any setting may be given by its dotted name, for instance --ppo.optim.lr 1e-6, "
    "--data.root FOLDER or --hardware gpu-8; `rlhf config RUNFILE` lists them all."
)
INTERRUPTED = 130
UNEXPECTED = 1
BAD_DATA, MISSING, MACHINE_TOO_SMALL = 3, 4, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Codes: rlhf.errors.UserError, 130 after Ctrl-C, 1 for a fault of this program."""
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

    run = _with_runfile(commands, "run", _run, "run the pipeline; stages that are complete and unchanged are skipped")
    run.add_argument("--fresh", action="store_true", help="start over: no stage is skipped")

    stage = _with_runfile(commands, "stage", _stage, "run one stage on the artifacts of those before it", _stage_name)
    stage.add_argument("--local", action="store_true", help="in this process, or one rank of torchrun, without Ray")

    _with_runfile(commands, "config", _config, "print the settings that a run would have, as YAML")

    score = _command(commands, "score", _score, "reward scores of pairs or completions")
    score.add_argument("model", metavar="MODEL", help="a reward model's folder")
    score.add_argument(
        "file", metavar="FILE", help="pairs or prompts with completions, in any form that training reads"
    )
    score.add_argument("--out", required=True, metavar="OUT.jsonl", help="one line of scores per row")
    _add_scoring(score)

    _add_evaluate(commands)
    text = "runs side by side: settings, results, curves"
    compare.add_arguments(_command(commands, "compare", compare.handler(_hush), text))

    chat = _command(commands, "chat", _chat, "talk with a model in the terminal")
    chat.add_argument("model", metavar="MODEL", help="a model's folder or hub name")
    chat.add_argument(
        "--temperature", type=_not_negative, default=0.7, help="0 takes the likeliest token (default 0.7)"
    )
    chat.add_argument("--max-new-tokens", type=_positive, default=512, metavar="N", help="default 512")

    gguf = _command(commands, "import-gguf", _import_gguf, "turn a GGUF file into an ordinary model folder")
    gguf.add_argument("source", metavar="SOURCE", help="a GGUF file, or an installed package that holds one")
    gguf.add_argument("out", metavar="OUT", help="the folder to make")

    lineage = _command(commands, "lineage", _lineage, "what a model was made from, back to the data")
    lineage.add_argument("model", metavar="MODEL", help="a folder of a run, models:/NAME@ALIAS or models:/NAME/3")
    _add_tracking(lineage)

    promote = _command(commands, "promote", _promote, "make a policy the champion if it is better than the present one")
    promote_arguments.add_to(promote)
    _add_tracking(promote)

    report = _command(commands, "report", _report, "show the closing report of a run")
    report.add_argument("run", metavar="RUN", help="the run's folder, for instance runs/quickstart")
    return parser


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("evaluate", help="reports on models", allow_abbrev=False)
    kinds = evaluate.add_subparsers(title="what is evaluated", metavar="KIND", required=True)
    reward = _command(kinds, "reward", _evaluate_reward, "report what the scores of reward models are worth")
    reward.add_argument(
        "inputs",
        metavar="MODEL… DATA…",
        nargs="+",
        help="reward models (folders, hub names) and data: pairs in any form that training reads, RewardBench, RewardBench 2, "
        "lists of responses with scores; or `shipped`",
    )
    reward.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the report; goes on after a kill"
    )
    reward.add_argument(
        "--train", nargs="+", default=[], metavar="PAIRS", help="pairs on which a floor, the bag of words, is fitted"
    )
    _add_scoring(reward)
    _add_tracking(reward)

    policy = _command(kinds, "policy", _evaluate_policy, "report what policies say to the same prompts")
    policy.add_argument("models", metavar="MODEL", nargs="+", help="a model's folder or hub name")
    policy.add_argument(
        "--prompts", nargs="+", default=[], metavar="FILE", help="in any form that training reads; or `shipped`"
    )
    policy.add_argument(
        "--checkpoints",
        action="store_true",
        help="MODEL… are folders of runs: reward against KL over their evaluations",
    )
    policy.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the report")
    policy.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME=REWARD",
        help="a reward model's folder, module:function or file.py:function; may be repeated",
    )
    policy.add_argument("--samples", type=_positive, default=1, metavar="N", help="responses per prompt (default 1)")
    policy.add_argument(
        "--temperature", type=_above_0, nargs="+", default=[1.0], metavar="T", help="pairs use the first (default 1)"
    )
    policy.add_argument("--reference", metavar="MODEL", help="from which KL is measured; same tokenizer")
    policy.add_argument(
        "--refusal", metavar="PATTERN", help="how refusals begin, or module:function (default: usual English ones)"
    )
    policy.add_argument("--max-new-tokens", type=_positive, default=512, metavar="N", help="default 512")
    policy.add_argument("--seed", type=int, default=0, help="default 0")
    _add_scoring(policy, batch_size=64)
    _add_tracking(policy)


def _add_tracking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        default="sqlite:///mlflow.db",
        help="where MLflow keeps the metrics (default sqlite:///mlflow.db); null: only files are written",
    )


def _add_scoring(parser: argparse.ArgumentParser, batch_size: int = 16) -> None:
    parser.add_argument(
        "--batch-size", type=_positive, default=batch_size, metavar="N", help=f"texts at once (default {batch_size})"
    )
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--bad-rows", choices=("refuse", "skip"), default="refuse", help="default refuse")


Handler = Callable[[argparse.Namespace, list[str]], int]


def _command(commands: argparse._SubParsersAction, name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(command=handler, takes_settings=False)
    return parser


def _with_runfile(
    commands: argparse._SubParsersAction,
    name: str,
    handler: Handler,
    text: str,
    stage: Callable[[str], tuple[str, str | None]] | None = None,
) -> argparse.ArgumentParser:
    parser = _command(commands, name, handler, text)
    if stage:
        parser.add_argument("stage", metavar="STAGE", type=stage, help=STAGE_HELP)
    parser.add_argument("runfile", metavar="RUNFILE", help="a YAML file, or the name of a packaged run (quickstart)")
    parser.usage = f"rlhf {name}{' STAGE' if stage else ''} RUNFILE [OPTION …] [--SETTING VALUE …]"
    parser.epilog = SETTINGS_HELP
    parser.set_defaults(takes_settings=True)
    return parser


def _stage_name(text: str) -> tuple[str, str | None]:
    """`reward/safety` → ("reward", "safety")."""
    stage, _, name = text.partition("/")
    if stage not in STAGES or (name and STAGES[stage].parts is None):
        raise argparse.ArgumentTypeError(f"{text!r} is no stage; there are {STAGE_HELP}")
    return stage, name or None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def _above_0(text: str) -> float:
    if (value := _not_negative(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


# --- commands: what they need is imported when they run ---------------------------------------------------------------


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    from launch.preflight import preflight
    from launch.settings import load

    config = load(args.runfile, overrides)
    preflight(config)
    from launch import pipeline

    return pipeline.run(config, args.fresh)


def _stage(args: argparse.Namespace, overrides: list[str]) -> int:
    from launch.preflight import preflight
    from launch.settings import load
    from rlhf.errors import UserError

    config = load(args.runfile, overrides)
    stage, name = args.stage
    if (f"{stage}/{name}" if name else stage) not in {*config.pipeline, *parts_of(config)}:
        made = f"pipeline has {', '.join(config.pipeline)}, which makes {', '.join(parts_of(config))}"
        raise UserError(f"this run has no {stage}{f'/{name}' if name else ''}: {made}")
    preflight(config, workers=not args.local)
    from launch import pipeline

    return pipeline.run_stage(config, stage, args.local, name)


def _config(args: argparse.Namespace, overrides: list[str]) -> int:
    from launch.settings import dump, load

    sys.stdout.write(dump(load(args.runfile, overrides)))
    return 0


def _score(args: argparse.Namespace, _: list[str]) -> int:
    _hush()
    from launch.score import score

    score(args.model, args.file, args.out, args.batch_size, args.precision, args.bad_rows)
    return 0


def _evaluate_reward(args: argparse.Namespace, _: list[str]) -> int:
    _hush()
    from launch.evaluate.reward import Options, evaluate_reward, show

    tracking_uri = None if args.tracking_uri == "null" else args.tracking_uri
    options = Options(args.batch_size, args.precision, args.bad_rows, args.train, tracking_uri)
    show(evaluate_reward(args.inputs, args.out, options), args.out)
    return 0


def _evaluate_policy(args: argparse.Namespace, _: list[str]) -> int:
    _hush()
    from launch.evaluate.policy import command

    command.run(args)
    return 0


def _chat(args: argparse.Namespace, _: list[str]) -> int:
    _hush()
    from launch.chat import chat

    chat(args.model, args.temperature, args.max_new_tokens)
    return 0


def _import_gguf(args: argparse.Namespace, _: list[str]) -> int:
    _hush()
    from rlhf.models import import_gguf

    print(f"{import_gguf(args.source, args.out)}: an ordinary model folder now")
    return 0


def _lineage(args: argparse.Namespace, _: list[str]) -> int:
    from launch.lineage.command import lineage

    return lineage(args.model, args.tracking_uri)


def _promote(args: argparse.Namespace, _: list[str]) -> int:
    _hush()
    from launch.promote.command import run

    return run(args)


def _report(args: argparse.Namespace, _: list[str]) -> int:
    from rlhf.errors import UserError

    path = Path(args.run) / "report.md"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run that has finished", MISSING)
    sys.stdout.write(path.read_text(encoding="utf-8"))
    return 0


def _hush() -> None:
    """DeepSpeed, which transformers imports, warns on stdout where it finds no GPU and nobody says so."""
    if not any(Path(driver).exists() for driver in ("/proc/driver/nvidia", "/dev/kfd")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# --- errors -----------------------------------------------------------------------------------------------------------


def _guarded(command: Callable[[], int]) -> int:
    """The one place where an exception becomes a message and an exit code."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
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
