"""What a notebook uses: `rlhf.PPOTrainer`, `rlhf.RewardModel`, `rlhf.load_policy`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf
from launch.settings import load
from reward_data import Message
from rlhf import PPOConfig, PPOTrainer, RewardModel, UserError, load_policy
from rlhf.chat import format_of
from rlhf.models import ScalarModel, load_causal, load_tokenizer, make_tiny
from rlhf.rewards import FunctionReward, Responses, Scored

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
PROMPTS = ["what is the opposite of hot?", "name a fruit", "hello", "what is the opposite of up?"]
SMALL = {"batch_size": 8, "minibatch_size": 8, "max_prompt_length": 64, "sampling": {"max_new_tokens": 8}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of an untrained tiny model."""
    return make_tiny(load(SMOKE, ["--runs_dir", str(tmp_path_factory.mktemp("runs"))]))


@pytest.fixture(scope="module")
def reward_model(model, tmp_path_factory):
    """The folder of a reward model with a random head."""
    folder = tmp_path_factory.mktemp("reward")
    backbone: Any = load_causal(model).base_model
    head_1H = torch.randn(1, backbone.config.hidden_size, generator=torch.Generator().manual_seed(0))
    ScalarModel(backbone, head_1H, offset=0.5).save(folder, load_tokenizer(model))  # type: ignore[arg-type]
    return folder


def config(**settings):
    return PPOConfig.model_validate(SMALL | {"iterations": 2, "advantage": "grpo", "group_size": 4} | settings)


def short(prompts, responses, **columns):
    return [-len(response) / 100 for response in responses]


@pytest.mark.integration  # a process of its own
def test_importing_loads_no_library_and_changes_nothing():
    code = (
        "import os, sys; before = dict(os.environ), list(sys.path); import rlhf; "
        "assert (dict(os.environ), list(sys.path)) == before; "
        "assert not {'torch', 'transformers', 'ray', 'mlflow', 'deepspeed'} & {*sys.modules}; "
        "import rlhf.api, rlhf.ppo.trainer, rlhf.distributed.engine; assert dict(os.environ) == before[0]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_no_other():
    assert {name: getattr(rlhf, name).__name__ for name in rlhf.__all__} == {name: name for name in rlhf.__all__}
    with pytest.raises(AttributeError, match="no attribute 'PPO'"):
        _ = rlhf.PPO


@pytest.mark.parametrize("advantage", ["gae", "grpo", "dr_grpo", "rloo", "reinforce++"])
def test_a_trainer_trains_and_saves(model, tmp_path, advantage):
    trainer = PPOTrainer(
        str(model), rewards={"short": short}, prompts=PROMPTS, config=config(advantage=advantage, optim={"lr": 1e-3})
    )
    trainer.train()
    assert [metrics["ppo/reward"] < 0 for metrics in trainer.history] == [True, True]
    trainer.save(tmp_path / "out")
    before, after = load_causal(model).state_dict(), load_causal(tmp_path / "out").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out/critic").exists() == (advantage == "gae") == ("ppo/value_loss" in trainer.history[0])


def test_a_reward_is_given_the_columns_of_its_rows(model):
    seen = []

    def right(prompts, responses, answer, level=None):
        seen.append((prompts, answer, level))
        return [float(len(wanted)) for wanted in answer]

    rows = [{"prompt": text, "answer": "x" * i, "level": i} for i, text in enumerate(PROMPTS)]
    trainer = PPOTrainer(model, rewards={"right": right}, prompts=rows, config=config(iterations=1))
    trainer.train()
    prompts, answer, level = seen[-1]
    assert [len(a) for a in answer] == level == [PROMPTS.index(prompt) for prompt in prompts]
    assert trainer.history[0]["ppo/reward"] == pytest.approx(sum(level) / 8 - 0)


def test_models_in_memory_and_reward_models_can_be_given(model, reward_model):
    given = load_causal(model), load_tokenizer(model)
    before = {name: tensor.clone() for name, tensor in given[0].state_dict().items()}
    judge = RewardModel.load(reward_model)
    trainer = PPOTrainer(given, rewards={"judge": judge, "short": short}, prompts=PROMPTS, config=config())
    trainer.train()
    first = trainer.history[0]
    assert first["ppo/reward"] == pytest.approx(first["ppo/reward_judge"] + first["ppo/reward_short"], abs=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given[0].state_dict().items())


def test_held_out_prompts_choose_what_is_saved(model, tmp_path):
    trainer = PPOTrainer(
        model,
        rewards={"short": short},
        prompts=PROMPTS[:2],
        held_out=PROMPTS[2:],
        config=config(eval_every=1, optim={"lr": 1e-3}),
    )
    rewards = iter([0.0, 2.0, 1.0])
    trainer.evaluator.reward = lambda prompts, iteration: next(rewards)  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.best_iteration == 1
    saved = load_causal(trainer.save(tmp_path / "out")).state_dict()
    of_best = load_causal(trainer.best_folder).state_dict()
    assert all(torch.equal(saved[name], of_best[name]) for name in saved)
    now = trainer.models.policy.module.causal.state_dict()  # type: ignore[union-attr]
    assert any(not torch.equal(saved[name], now[name]) for name in saved)


def test_a_folder_keeps_metrics_and_training_goes_on_from_its_checkpoint(model, tmp_path):
    settings = config(iterations=4, checkpoint_every=2, optim={"lr": 1e-3})

    def trained(folder, until=4):
        trainer = PPOTrainer(model, rewards={"short": short}, prompts=PROMPTS, config=settings, folder=folder)
        step = trainer.step

        def broken():
            if trainer.state.iteration > until:
                raise KeyboardInterrupt
            return step()

        trainer.step = broken  # type: ignore[method-assign]
        try:
            return trainer.train()
        except KeyboardInterrupt:
            return trainer

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "broken", until=3)
    resumed = trained(tmp_path / "broken")
    assert len(resumed.history) == 2 and (tmp_path / "broken/metrics.jsonl").exists()
    for (name, one), other in zip(
        whole.models.policy.module.named_parameters(), resumed.models.policy.module.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": {}}, "rewards must name at least one reward"),
        ({"rewards": {"x": 3}}, r"rewards\['x'\] is a int"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a", 3]}, r"prompts\[1\] is '3'"),
        ({"prompts": [{"text": "a"}]}, r"prompts\[0\]"),
        ({"prompts": "Name a fruit."}, "prompts is one text"),
        ({"rewards": short}, "rewards must name at least one reward"),
        ({"config": config(rewards={"s": {"function": "os:x"}})}, "config.rewards is for run files"),
        ({"settings": {"model": {"lorra": {}}}}, "model.lorra"),
        ({"model": 7}, "model must be a folder"),
        ({"config": config(batch_size=10)}, "ppo.batch_size is 10, not a multiple of minibatch_size 8"),
        ({"config": config(group_size=1)}, "ppo.group_size is 1, but grpo"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_runs(model, given, message):
    usable = {"model": model, "rewards": {"short": short}, "prompts": PROMPTS, "config": config()}
    with pytest.raises(UserError, match=message):
        PPOTrainer(**(usable | given))


class Length:
    """A `Reward` of one's own."""

    def __call__(self, responses: Responses) -> Scored:
        values = [float(len(text)) for text in responses.texts]
        return Scored(torch.tensor(values), torch.tensor([value > 3 for value in values]))


def test_rewards_of_every_kind_and_their_weights(model):
    late = FunctionReward("late", short, timeout_s=600)
    rewards = {"length": (Length(), 0.0), "short": (short, 2.0), "late": late}
    trainer = PPOTrainer(model, rewards=rewards, prompts=PROMPTS, config=config(iterations=1)).train()
    (told,) = trainer.history
    assert told["ppo/reward"] == pytest.approx(3 * told["ppo/reward_short"], abs=1e-5)
    assert told["ppo/reward_late"] == told["ppo/reward_short"] and told["ppo/reward_failed_fraction"] == 0


def test_a_reward_model_with_another_tokenizer_reads_texts(model, tmp_path):
    smoke = load(SMOKE, ["--runs_dir", str(tmp_path), "--model.tiny.vocab_size", "400"])
    other = make_tiny(smoke)
    backbone: Any = load_causal(other).base_model
    head_1H = torch.randn(1, backbone.config.hidden_size, generator=torch.Generator().manual_seed(0))
    ScalarModel(backbone, head_1H).save(tmp_path / "judge", load_tokenizer(other))
    judge, seen = RewardModel.load(tmp_path / "judge"), []

    def watch(messages, responses):
        seen.append((messages, responses))
        return [0.0] * len(responses)

    trainer = PPOTrainer(
        model, rewards={"judge": judge, "watch": watch}, prompts=PROMPTS, config=config(iterations=1)
    ).train()
    assert trainer.history[0]["ppo/reward_judge"] == pytest.approx(sum(judge.score(*seen[-1])) / 8, abs=1e-5)


def test_a_model_without_a_trained_head_is_no_reward_model(model):
    with pytest.raises(UserError, match="is no reward model"):
        RewardModel.load(model)


def test_a_save_replaces_an_earlier_one_and_nothing_else(model, tmp_path):
    trainer = PPOTrainer(model, rewards={"short": short}, prompts=PROMPTS, config=config(iterations=1)).train()
    for _ in range(2):
        trainer.save(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="mine is not empty .it holds thesis.tex"):
        trainer.save(tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "other",
    [
        {"rewards": {"other": short}},
        {"prompts": PROMPTS[:2]},
        {"settings": {"seed": 7}},
        {"config": config(kl_coef=0.5)},
    ],
)
def test_a_folder_of_another_training_is_refused(model, tmp_path, other: dict[str, Any]):
    given: dict[str, Any] = {"rewards": {"short": short}, "prompts": PROMPTS, "config": config(iterations=1)}
    PPOTrainer(model, folder=tmp_path, **given).train()
    longer: dict[str, Any] = given | {"config": config(iterations=2, checkpoint_every=1)}
    PPOTrainer(model, folder=tmp_path, **longer)  # more iterations are the same training
    with pytest.raises(UserError, match="holds another training"):
        PPOTrainer(model, folder=tmp_path, **(given | other))


def test_training_that_was_interrupted_inside_an_iteration_does_not_go_on(model):
    trainer = PPOTrainer(model, rewards={"short": short}, prompts=PROMPTS, config=config(iterations=2))
    step = trainer.step

    def interrupted():
        step()
        raise KeyboardInterrupt

    trainer.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.step = step  # type: ignore[method-assign]
    with pytest.raises(UserError, match="interrupted in the middle of iteration 1"):
        trainer.train()


def test_adapters_can_be_trained(model, tmp_path):
    trainer = PPOTrainer(
        model,
        rewards={"short": short},
        prompts=PROMPTS,
        config=config(optim={"lr": 1e-2}),
        settings={"model": {"lora": {"rank": 4}}},
    )
    trainer.train().save(tmp_path / "out")
    assert (tmp_path / "out/adapter/adapter_config.json").exists()


def test_a_reward_that_raises_stops_before_the_first_step(model):
    def broken(responses):
        raise KeyError("no such key")

    trainer = PPOTrainer(model, rewards={"broken": broken}, prompts=PROMPTS, config=config())
    with pytest.raises(UserError, match="reward.broken: the number of calls that raised or were late is 1.*KeyError"):
        trainer.train()
    assert trainer.history == []


def test_a_reward_model_scores_as_its_tensors_say(reward_model):
    judge = RewardModel.load(reward_model)
    tokenizer = load_tokenizer(reward_model)
    expected = []
    for prompt, response in zip(PROMPTS, ["a", "bb bb", "c", "dddd d"], strict=True):
        ids = torch.tensor([format_of(tokenizer).encode_response([Message("user", prompt)], response)])
        values_1T = judge.model(ids, torch.ones_like(ids))
        expected.append(float(values_1T[0, -1]) - 0.5)
    assert judge.score(PROMPTS, ["a", "bb bb", "c", "dddd d"], batch_size=3) == pytest.approx(expected, abs=1e-5)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    assert judge.score([messages], ["a"]) == pytest.approx(expected[:1], abs=1e-5)
    with pytest.raises(UserError, match="1 prompts, but 2 responses"):
        judge.score(["a"], ["b", "c"])


def test_a_policy_gives_a_prompt_the_same_response_beside_others_and_another_with_another_seed(model):
    policy = load_policy(model)
    alone = policy.generate(PROMPTS[:1], max_new_tokens=12)
    assert policy.generate(PROMPTS, max_new_tokens=12)[:1] == alone
    assert policy.generate(PROMPTS[:1], max_new_tokens=12, seed=1) != alone
    assert len({*policy.generate(PROMPTS[:1] * 4, max_new_tokens=12)}) == 4
    greedy = [policy.generate(PROMPTS[:1], max_new_tokens=12, temperature=0, seed=seed) for seed in (0, 1)]
    assert greedy[0] == greedy[1]
