"""Stages that only commit something, without Ray, and few rows for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import pytest

from reward_data.load import SHIPPED
from rlhf.config import RunConfig
from rlhf.runs import artifacts, provenance
from stages.base import stage_of

STAGES = ["sft", "reward/helpfulness", "reward/safety", "ppo"]


class FakeWorkerGroup:
    """A worker group that is done at once."""

    started: ClassVar[list[str]]
    meets: ClassVar[dict[str, BaseException]]  # stage → what befalls it

    def __init__(self, config: RunConfig, stage: str, workers: int) -> None:
        self.started.append(stage)
        self.news: list[str] = []
        self.restarts = 0
        self.error = self.meets.get(stage)
        if self.error is None:
            commit(config, stage)

    def waits_for(self) -> str:
        return ""

    def done(self, timeout_s: float) -> bool:
        return True

    def result(self) -> None:
        if self.error:
            raise self.error


def commit(config: RunConfig, stage: str) -> None:
    """An artifact that holds what it was made from."""
    own = stage_of(stage)
    inputs = {name: artifacts.load(config.folder / name / "artifact") for name in own.inputs(config)}
    parents = provenance.parents(provenance.stage_data(config, own.roles), inputs)
    digest = provenance.settings_digest(config, stage, own.roles)
    folder = artifacts.begin(config.folder / stage / "artifact")
    (folder / "model.safetensors").write_text(json.dumps([stage, digest, parents]))
    artifacts.complete(folder, stage, parents, digest, {})


@contextmanager
def no_cluster(config: RunConfig) -> Iterator[None]:
    yield


@contextmanager
def few_shipped_rows(folder: Path) -> Iterator[None]:
    """The first rows of each shipped file, for a run takes no more, and reading all would be most of its time."""
    for file in SHIPPED.iterdir():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / file.name).write_text("".join(lines[:150]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("reward_data.load"), "SHIPPED", folder)
        yield
