"""`rlhf run`, `stage`, `doctor`, `config` and `report`: runs and their settings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.commands.arguments import command, silence_deepspeed
from stages.base import STAGES, parts_of

STAGE_HELP = f"{', '.join(STAGES)}; reward/NAME is one reward model"
SETTINGS_HELP = (
    "After RUNFILE any setting may be given by its dotted name, for instance --ppo.optim.lr 1e-6, "
    "--data.root FOLDER or --hardware gpu-8; `rlhf config RUNFILE` lists them all."
)
MISSING = 4


def add(commands: argparse._SubParsersAction) -> None:
    run = command(commands, "run", _run, "run the pipeline; stages that are complete and unchanged are skipped")
    takes_settings(run, "run RUNFILE")
    run.add_argument("--fresh", action="store_true", help="start over: no stage is skipped")

    stage = command(commands, "stage", _stage, "run one stage on the artifacts of those before it")
    stage.add_argument("stage", metavar="STAGE", type=_stage_name, help=STAGE_HELP)
    takes_settings(stage, "stage STAGE RUNFILE")
    stage.add_argument("--local", action="store_true", help="in this process, or one rank of torchrun, without Ray")

    text = "check nodes, network, storage, data and services before a run"
    takes_settings(command(commands, "doctor", _doctor, text), "doctor RUNFILE")

    config = command(commands, "config", _config, "print the settings that a run would have, as YAML")
    takes_settings(config, "config RUNFILE")

    report = command(commands, "report", _report, "show the closing report of a run")
    report.add_argument("run", metavar="RUN", help="the run's folder, for instance runs/quickstart")


def takes_settings(parser: argparse.ArgumentParser, usage: str) -> None:
    """`usage`: the command and what must be given. Any setting may follow."""
    parser.add_argument("runfile", metavar="RUNFILE", help="a YAML file, or the name of a packaged run (quickstart)")
    parser.usage = f"rlhf {usage} [OPTION …] [--SETTING VALUE …]"
    parser.epilog = SETTINGS_HELP
    parser.set_defaults(takes_settings=True)


def _stage_name(text: str) -> tuple[str, str | None]:
    """`reward/safety` → ("reward", "safety")."""
    stage, _, name = text.partition("/")
    if stage not in STAGES or (name and STAGES[stage].parts is None):
        raise argparse.ArgumentTypeError(f"{text!r} is no stage; there are {STAGE_HELP}")
    return stage, name or None


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


def _doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    from launch.doctor.command import doctor
    from launch.settings import load

    silence_deepspeed()
    return doctor(load(args.runfile, overrides))


def _config(args: argparse.Namespace, overrides: list[str]) -> int:
    from launch.settings import dump, load

    sys.stdout.write(dump(load(args.runfile, overrides)))
    return 0


def _report(args: argparse.Namespace, _: list[str]) -> int:
    from rlhf.errors import UserError

    path = Path(args.run) / "report.md"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run that has finished", MISSING)
    sys.stdout.write(path.read_text(encoding="utf-8"))
    return 0
