"""Folders of finished runs as the pipeline leaves them, without the hours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launch import parent_run
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.data import Split
from rlhf.evaluation import held_out
from rlhf.tracking import open_tracker

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
PROMPTS = tuple(f"prompt {n}" for n in range(8))


def record_run(
    runs_dir: Path,
    name: str,
    *overrides: str,
    gold: Sequence[float] = (0.0,) * len(PROMPTS),
    prompts: Sequence[str] = PROMPTS,
    digest: str = "a",
) -> Path:
    """The folder of a run whose policy got `gold` on `prompts`. Its curve `ppo/reward` climbs to the mean of that."""
    given = ["--runs_dir", str(runs_dir), "--name", name, "--tracking.uri", "null", *overrides]
    config = load(SMOKE, given)
    data = {role: Split([], [], {"file": digest}, []) for role in ("demonstrations", "preferences", "prompts")}
    tracker = parent_run.begin(config, data)
    _record_ppo(config, gold, prompts)
    mean = sum(gold) / len(gold)
    estimate = {"value": mean, "low": mean - 0.1, "high": mean + 0.1, "n": len(gold)}
    policies = {policy: {"gold": estimate, "reward": {"safety": estimate}} for policy in ("base", "sft", "ppo")}
    report = {
        "sft": {"held_out_loss": 2.5},
        "reward": {"safety": {"accuracy": estimate}},
        "ppo": {"held_out": policies},
    }
    (config.folder / "report.json").write_text(json.dumps(report))
    tracker.artifact(config.folder / "report.json")
    tracker.close()
    return config.folder


def _record_ppo(config: RunConfig, gold: Sequence[float], prompts: Sequence[str]) -> None:
    folder = config.folder / "ppo"
    tracker = open_tracker(folder, config.tracking, "ppo", "", True)
    for step in (1, 2):
        tracker.metrics({"ppo/reward": step / 2 * sum(gold) / len(gold), "perf/seconds_iteration": 1.0}, step)
    (folder / "artifact").mkdir()
    held_out.write(folder / "artifact", held_out.rows_of(prompts, prompts, {"gold": gold}))
    tracker.artifact(folder / "artifact" / held_out.FILE)
    tracker.close()
