"""What a run has done so far, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.runs import newest_checkpoint

STAGES = ("sft", "reward/helpfulness", "reward/safety", "ppo")


@dataclass(frozen=True, order=True)
class Rank:
    stage: str
    rank: int
    node: int
    pid: int  # on its node


def stage_states(run: Path) -> dict[str, dict[str, Any]]:
    """Of the stages that the driver has begun; empty while there is no driver."""
    with suppress(OSError, ValueError):
        return json.loads((run / "status.json").read_text())["stages"]
    return {}


def running(run: Path) -> list[str]:
    """Stages of which ranks are alive and no artifact is complete."""
    return [stage for stage in STAGES if not is_complete(run / stage) and any((run / stage).glob("ranks/*/rank-*"))]


def is_complete(stage: Path) -> bool:
    return (stage / "artifact/manifest.json").exists()


def ranks(run: Path, stages: Sequence[str]) -> list[Rank]:
    """Those of `stages` that have begun."""
    found = []
    for stage in stages:
        for path in (run / stage).glob("ranks/*/rank-*.json"):
            with suppress(OSError, ValueError):
                one = json.loads(path.read_text())
                found.append(Rank(stage, one["rank"], int(one["host"].removeprefix("node")), one["pid"]))
    return sorted(found)


def restarts(run: Path, stage: str) -> int:
    """By the driver that wrote last."""
    return stage_states(run).get(stage, {}).get("restarts", 0)


def driver_pid(run: Path) -> int:
    """Of the driver that wrote last, 0 if none has."""
    with suppress(OSError, ValueError):
        return json.loads((run / "status.json").read_text())["driver"]["pid"]
    return 0


def has_new_checkpoints(run: Path, stages: Sequence[str], before: dict[str, int]) -> bool:
    """Whether each of `stages` has one that is newer than `before`."""
    return bool(stages) and all(newest_checkpoint(run / stage) > before.get(stage, -1) for stage in stages)


def lines(stage: Path, since: float = 0.0) -> list[dict[str, float]]:
    """The metrics that were written after a time, in the order of writing."""
    path, found = stage / "metrics.jsonl", []
    if path.exists():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):  # the last one may be half written
                found.append(json.loads(line))
    return [line for line in found if line["time"] > since]


def steps_done(stage: Path) -> int:
    return max((int(line["step"]) for line in lines(stage)), default=0)


def went_on_at(stage: Path, since: float) -> float | None:
    """When the first metrics after a time were written, or the artifact; None as long as none were."""
    if later := lines(stage, since):
        return later[0]["time"]
    return max(since, (stage / "artifact/manifest.json").stat().st_mtime) if is_complete(stage) else None


def steps_repeated(stage: Path, reached: int, since: float) -> int:
    """How many of the steps up to `reached` were done again after a time."""
    later = lines(stage, since)
    return max(0, reached + 1 - int(later[0]["step"])) if later else 0
