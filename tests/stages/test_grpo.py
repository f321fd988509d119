"""GRPO as a stage: nothing of a critic is loaded, saved or told, and a reward model may stand beside a function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rlhf.ppo import models
from rlhf.runs import checkpoint
from rlhf.tracking import read_metrics

pytestmark = pytest.mark.integration

REWARDS = "{{letters: {{function: '{file}:letters', weight: 2}}, helpfulness: {{model: helpfulness, weight: 0.5}}}}"


def letters(responses: list[str]) -> list[float]:
    return [sum(letter.isalpha() for letter in response) / 10 for response in responses]


@pytest.fixture(scope="module")
def trained(run, beside, make_stage) -> Any:
    """The stage, the scalar models that it opened, and the parts of its checkpoints."""
    config = beside(
        run("reward/safety"),
        *("--ppo.advantage", "grpo", "--ppo.group_size", "4", "--ppo.rewards", REWARDS.format(file=__file__)),
    )
    opened, saved = [], []
    with pytest.MonkeyPatch.context() as patch:
        load_scalar, new_critic, save = models.load_scalar, models.new_critic, checkpoint.save
        patch.setattr(
            models, "load_scalar", lambda *given, **named: opened.append(given[0]) or load_scalar(*given, **named)
        )
        patch.setattr(models, "new_critic", lambda model: opened.append("critic") or new_critic(model))
        patch.setattr(
            checkpoint,
            "save",
            lambda folder, step, parts, *rest: saved.append(set(parts)) or save(folder, step, parts, *rest),
        )
        artifact = make_stage(config, "ppo")
    told = {name: dict(points) for name, points in read_metrics(config.folder / "ppo").items()}
    return SimpleNamespace(config=config, artifact=artifact, told=told, opened=opened, saved=saved)


def test_no_critic_is_opened_or_saved(trained):
    assert trained.opened == [trained.config.folder / "reward/helpfulness/artifact"]  # the one that is a reward
    assert trained.saved == [{"policy", "prefetched"}] * 2
    assert not (trained.artifact / "critic").exists()
    AutoModelForCausalLM.from_pretrained(trained.artifact)


def test_no_metric_is_about_a_critic(trained):
    assert trained.told["ppo/grad_norm"][1] > 0 and trained.told["ppo/kl_loss"][2] > 0
    assert not [name for name in trained.told if any(word in name for word in ("critic", "value", "explained"))]


def test_the_score_is_the_weighted_sum_of_function_and_model(trained):
    for step in (1, 2):
        told = {name: points[step] for name, points in trained.told.items() if step in points}
        assert told["ppo/reward"] == pytest.approx(
            2 * told["ppo/reward_letters"] + 0.5 * told["ppo/reward_helpfulness"], abs=1e-5
        )
        assert told["ppo/reward_failed_fraction"] == 0


def test_the_artifact_tells_of_each_reward(trained, metrics):
    told = metrics(trained.artifact)["held_out"]["ppo"]
    assert {"reward.letters", "reward.helpfulness"} <= told.keys()
    assert "reward.safety" not in told and "flagged.safety" not in told
