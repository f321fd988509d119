"""PPO goes on after an interruption, stops early, and keeps its best policy."""

from __future__ import annotations

import math
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.data import load_prompts
from rlhf.errors import UserError
from rlhf.ppo import trainer
from rlhf.ppo.evaluator import Evaluator
from rlhf.ppo.setup import reward_set
from rlhf.runs import checkpoint, stopping
from tests.stages.ppo_runs import ALL_BUT_PPO, assert_same_weights, opened, series, weights

pytestmark = pytest.mark.integration


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "name"), [(trainer, "update"), (checkpoint, "save")])
def test_an_interrupted_run_goes_on_bit_for_bit(run, beside, make_stage, interrupted, monkeypatch, place, name):
    """Broken off in the second iteration: before the models learn, and when all is done but the checkpoint."""
    whole, config = run("ppo"), beside(run(ALL_BUT_PPO))
    original = getattr(place, name)

    def fail(*arguments):
        if checkpoint.complete(config.folder / "ppo/checkpoints"):
            raise interrupted
        return original(*arguments)

    monkeypatch.setattr(place, name, fail)
    with pytest.raises(interrupted):
        make_stage(config, "ppo")
    monkeypatch.undo()
    artifact = make_stage(config, "ppo")
    assert series(config) == series(whole)
    assert_same_weights(artifact, whole.folder / "ppo/artifact")
    assert_same_weights(artifact / "critic", whole.folder / "ppo/artifact/critic")


def test_a_stage_that_is_asked_to_stop_ends_its_iteration_and_goes_on_bit_for_bit(run, beside, make_stage, monkeypatch):
    """Also where no checkpoint is due after that iteration."""
    rarely = ("--ppo.checkpoint_every", "99")
    whole, config = run("ppo"), beside(run(ALL_BUT_PPO), *rarely)
    monkeypatch.setattr(stopping, "_signal", signal.SIGTERM)
    with pytest.raises(UserError, match="stopped by SIGTERM after iteration 1, with a checkpoint") as caught:
        make_stage(config, "ppo")
    assert caught.value.exit_code == 143
    monkeypatch.undo()
    artifact = make_stage(config, "ppo")
    assert series(config) == series(whole)
    assert_same_weights(artifact, whole.folder / "ppo/artifact")


def test_a_learning_rate_of_zero_stays_flat_and_stops_early(run, beside, make_stage, metrics):
    still = "{lr: 0}"
    config = beside(
        run(ALL_BUT_PPO),
        *("--ppo.optim", still, "--ppo.critic_optim", still, "--ppo.iterations", "9", "--ppo.patience", "2"),
    )
    artifact = make_stage(config, "ppo")
    rewards = [value for _, value in series(config)["eval/reward"]]
    assert rewards == [rewards[0]] * 3  # iterations 0, 1 and 2: no better twice, so no third
    assert all(abs(value) < 1e-4 for _, value in series(config)["ppo/kl"])
    told = metrics(artifact)
    assert (told["iterations"], told["best_iteration"]) == (2, 0)
    assert_same_weights(artifact, config.folder / "sft/artifact")


def test_the_best_iteration_is_kept_and_not_the_last(run, beside, make_stage, metrics, monkeypatch):
    config = beside(run(ALL_BUT_PPO), "--ppo.iterations", "3")
    judged, kept = {}, []
    rewards = iter([0.0, 2.0, 1.0, 1.5])

    def reward(self, prompts, iteration):
        judged[iteration] = self._models.sampler.model.state_dict()["lm_head.weight"].clone()
        return next(rewards)

    monkeypatch.setattr(Evaluator, "reward", reward)
    artifact = make_stage(config, "ppo")
    assert metrics(artifact)["best_iteration"] == 1
    kept = weights(artifact)["lm_head.weight"]
    assert [torch.equal(kept, weight) for _, weight in sorted(judged.items())] == [False, True, False, False]


def test_the_reward_that_chooses_is_the_one_that_ppo_maximises(run):
    """Safety's score for a prompt of safety and for a response that its model calls unsafe, else helpfulness's."""
    config, sent = run(ALL_BUT_PPO), {}
    prompts, found = load_prompts(config).held_out, opened(config)
    context: Any = SimpleNamespace(
        device=torch.device("cpu"),
        is_writer=False,
        tracker=SimpleNamespace(metrics=lambda metrics, step: sent.update(metrics)),
    )
    answers: Any = Evaluator(config, context, found, reward_set(config, found)).evaluate(prompts)
    helpful, safety = (answers.scores[f"reward.{name}"] for name in ("helpfulness", "safety"))
    logits = [score + found.reward_models["safety"].module.offset for score in safety]
    of_helpful = sorted(logit for logit, prompt in zip(logits, prompts, strict=True) if prompt.tag == "helpful")
    middle = sum(of_helpful[len(of_helpful) // 2 - 1 :][:2]) / 2
    threshold = {"safety_threshold": 1 / (1 + math.exp(-middle))}
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update=threshold)})
    chosen_by = Evaluator(config, context, found, reward_set(config, found)).reward(prompts, 0)
    by_safety = [prompt.tag == "safety" or logit < middle for prompt, logit in zip(prompts, logits, strict=True)]
    kinds = {(prompt.tag, branch) for prompt, branch in zip(prompts, by_safety, strict=True)}
    assert kinds == {("safety", True), ("helpful", True), ("helpful", False)}
    scores = [s if branch else h for h, s, branch in zip(helpful, safety, by_safety, strict=True)]
    assert chosen_by == sent["eval/reward"] == pytest.approx(sum(scores) / len(scores))
    assert sent["eval/reward_helpfulness"] == pytest.approx(sum(helpful) / len(helpful))
    assert sent["eval/kl"] == pytest.approx(sum(answers.kl) / len(answers.kl), abs=1e-6)
