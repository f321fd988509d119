"""The stages of a small run, each made once and in this process; a stage is made when the first test asks for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import pipeline
from launch.settings import load
from rlhf.config import RunConfig

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
LORA = "{rank: 4, alpha: 8}"


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole stages are made here, once for all files: another process would make them again."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """settings(*overrides) → the small run, alone in one process, in a runs folder of its own."""

    def make(*overrides: str) -> RunConfig:
        runs_dir = tmp_path_factory.mktemp("runs")
        own = ["--runs_dir", str(runs_dir), "--hardware.workers", "1", "--tracking.uri", "null"]
        return load(SMOKE, [*own, *overrides])

    return make


@pytest.fixture(scope="session")
def make_stage() -> Callable[[RunConfig, str], Path]:
    """make_stage(config, "reward/safety") runs one stage here and returns its artifact's folder."""

    def make(config: RunConfig, stage: str) -> Path:
        kind, _, name = stage.partition("/")
        pipeline.run_stage(config, kind, True, name or None)
        return config.folder / stage / "artifact"

    return make


@pytest.fixture(scope="session")
def beside(settings) -> Callable[..., RunConfig]:
    """beside(config, *overrides) → another run, with the finished stages of `config` but PPO copied into it."""

    def make(config: RunConfig, *overrides: str) -> RunConfig:
        other = settings(*overrides)
        shutil.copytree(config.folder, other.folder, ignore=lambda *_: {"ppo"})
        return other

    return make


def made(settings, make_stage, *overrides: str) -> Callable[[str], RunConfig]:
    """upto(stage) → the run with all stages up to that one; none is made twice."""
    config = settings(*overrides)

    def upto(stage: str) -> RunConfig:
        for needed in ("sft", "reward/helpfulness", "reward/safety", "ppo"):
            if not (config.folder / needed / "artifact" / "manifest.json").exists():
                make_stage(config, needed)
            if needed == stage:
                break
        return config

    return upto


@pytest.fixture(scope="session")
def run(settings, make_stage) -> Callable[[str], RunConfig]:
    return made(settings, make_stage)


@pytest.fixture(scope="session")
def lora_run(settings, make_stage) -> Callable[[str], RunConfig]:
    return made(settings, make_stage, "--model.lora", LORA)


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], dict[str, Any]]:
    """The metrics that the manifest of an artifact holds."""
    return lambda artifact: json.loads((artifact / "manifest.json").read_text())["metrics"]


class Interrupted(Exception):
    """Stands in for a worker that dies."""


@pytest.fixture(scope="session")
def interrupted() -> type[Exception]:
    return Interrupted
