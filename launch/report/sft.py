"""SFT in the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.report.section import Metrics, Section, number


def _gather(folder: Path, metrics: Metrics) -> dict[str, Any]:
    return {key.removeprefix("sft/"): value for key, value in metrics["sft"].items()}


def _facts(found: Mapping[str, Any]) -> list[str]:
    return [f"SFT: held-out loss {number(found['held_out_loss'])} nats per response token"]


def _results(found: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {("sft", "held_out_loss"): {"value": found["held_out_loss"]}}


SECTION = Section(_gather, facts=_facts, results=_results)
