"""What MLflow has of an artifact."""

from pathlib import Path

import pytest

from launch.logged_model import describe, held_out
from launch.settings import load
from rlhf.runs.artifacts import Artifact

SMOKE = Path(__file__).parents[1] / "smoke.yaml"


def estimate(value: float | None) -> dict:
    return {"value": value, "low": 0, "high": 1, "n": 9}


def test_estimates_are_taken_with_their_groups_and_counts_are_not() -> None:
    metrics = {
        "accuracy": estimate(0.7),
        "by_tag": {"safety": estimate(0.6)},
        "reward.helpfulness": estimate(0.5),
        "calibration": [{"observed": estimate(0.4)}],
        "ties": estimate(None),
        "held_out_loss": 2.0,
        "steps": 3,
    }
    assert dict(held_out(metrics)) == {
        "held_out/accuracy": 0.7,
        "held_out/by_tag_safety": 0.6,
        "held_out/reward_helpfulness": 0.5,
        "held_out/loss": 2.0,
    }


def described(tmp_path: Path, artifact: Artifact) -> dict:
    config = load(SMOKE, ["--runs_dir", str(tmp_path), "--tracking.experiment", "mine"])
    (config.folder / "data").mkdir(parents=True)
    for role in ("demonstrations", "preferences", "prompts"):
        (config.folder / f"data/{role}.held_out.jsonl").touch()
    return describe(config, artifact)


def test_what_ppo_measured_on_the_sft_model_is_for_that_model(tmp_path: Path) -> None:
    held_out_of = {policy: {"gold": estimate(value)} for policy, value in (("base", 0.1), ("sft", 0.4), ("ppo", 0.6))}
    parents = {"sft": "d-sft", "reward/safety": "d-reward", "prompts: base": "d-prompts"}
    found = described(tmp_path, Artifact("ppo", tmp_path, "d", parents, "", "", {"held_out": held_out_of}))
    assert found["metrics"] == {"held_out/gold": 0.6}
    assert found["measured"] == [{"digest": "d-sft", "metrics": {"held_out/gold": 0.4}}]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sft", "mine-sft"),
        ("reward/helpfulness", "mine-reward-helpfulness"),
        ("dpo", "mine-policy"),
        ("ppo", "mine-policy"),
    ],
)
def test_versions_that_can_take_each_others_place_have_one_name(tmp_path: Path, kind: str, name: str) -> None:
    parents = {"sft": "d-sft", "prompts: shipped:train": "d-prompts"}
    registered = described(tmp_path, Artifact(kind, tmp_path, "d", parents, "settings", "revision", {}))["registered"]
    assert registered["name"] == name
    assert registered["inputs"] == {"sft": "d-sft"}
    assert registered["tags"] == {
        "run": "smoke",
        "artifact.kind": kind,
        "config.digest": "settings",
        "git.revision": "revision",
        "data.prompts: shipped:train": "d-prompts",
    }
