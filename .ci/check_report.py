"""Exits with an error where a run's report.json lacks a figure that docs/metrics.md promises: check_report.py REPORT."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ESTIMATE = ("value", "low", "high", "n")
REWARD_MODELS = ("helpfulness", "safety")
POLICIES = ("base", "sft", "ppo")
HELD_OUT = (*(f"reward.{name}" for name in REWARD_MODELS), "gold", "length", "eos_rate", "distinct_2")


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Leaves of nested mappings by dotted path."""
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, object] = {}
    for key, inner in value.items():
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def promised() -> list[str]:
    """Every path that must have a value, itself or below it."""
    accuracies = [f"reward.{name}.accuracy.{part}" for name in REWARD_MODELS for part in ESTIMATE]
    by_rating = [f"reward.{name}.by_rating" for name in REWARD_MODELS]
    held_out = [f"ppo.held_out.{who}.{what}.{part}" for who in POLICIES for what in HELD_OUT for part in ESTIMATE]
    stages = [f"{section}.{stage}" for section in ("seconds", "artifacts") for stage in ("sft", "reward", "ppo")]
    return [
        *accuracies,
        *by_rating,
        *held_out,
        "ppo.kl",
        "ppo.gain.gold",
        *stages,
        "mlflow.tracking_uri",
        "mlflow.run_id",
    ]


def missing(report: dict) -> list[str]:
    filled = [path for path, value in flatten(report).items() if value is not None]
    return [path for path in promised() if not any(re.match(re.escape(path) + r"($|[./])", f) for f in filled)]


def main() -> None:
    path = Path(sys.argv[1])
    lacks = missing(json.loads(path.read_text()))
    if lacks:
        sys.exit(f"{path} lacks {len(lacks)} of {len(promised())} promised figures:\n  " + "\n  ".join(lacks))
    print(f"{path}: all {len(promised())} promised figures are there")


if __name__ == "__main__":
    main()
