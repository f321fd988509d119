"""Held-out answers: in the order of their prompts, scored as they are, whatever the layout."""

import copy
import dataclasses
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reward_data import Message, Prompt
from reward_data import gold as gold_of_the_world
from rlhf.config import (
    DataConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RoleConfig,
    RunConfig,
    SamplingConfig,
    TinyConfig,
)
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler
from rlhf.models import ScalarModel
from rlhf.models.policy import PolicyModel
from rlhf.models.tiny import train_tokenizer, untrained_llama
from rlhf.ppo.evaluator import Evaluator
from rlhf.ppo.setup import reward_set
from rlhf.rewards import FunctionReward, RewardSet, weighted_sum

SHAPE = TinyConfig(vocab_size=270, hidden_size=16, intermediate_size=16, layers=1, heads=2)
TEXTS = ["hi", "what is the sum of 2 and 3?", "say no", "count to nine for me please", "why?"]
PROMPTS = [Prompt((Message("user", text),), "helpful", f"x:{i}") for i, text in enumerate(TEXTS)]
EMPTY = RoleConfig(train=[])
MODELS = RewardConfig(models={name: RewardModelConfig(own_tag="helpful") for name in ("one", "two")})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, SHAPE.vocab_size)


@pytest.fixture(scope="module")
def llama(tokenizer):
    """Its EOS is likely enough that some answers end."""
    model = untrained_llama(SHAPE, tokenizer, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[tokenizer.eos_token_id] = 8 * model.lm_head.weight[40]
    return model


@pytest.fixture
def evaluator(tokenizer, llama, models_of, tmp_path):
    """evaluator(gold=…, rewards=…, micro_batch_size=…) of the model, with two reward models, the first one for safety, and
    the model as its own reference. What it tells its tracker stands in `told`."""

    def make(gold: Any = "none", rewards: Any = None, **settings: Any) -> Any:
        ppo = PPOConfig(
            helpfulness_model="two",
            safety_model="one",
            max_prompt_length=64,
            sampling=SamplingConfig(max_new_tokens=6, batch_size=2, temperature=0.9),
        )
        data = DataConfig(demonstrations=EMPTY, preferences=EMPTY, prompts=EMPTY, gold=gold)
        config = RunConfig(name="x", data=data, reward=MODELS, ppo=ppo.model_copy(update=settings))
        sampler = InProcessSampler(copy.deepcopy(llama), [tokenizer.eos_token_id], tokenizer.pad_token_id)
        models = models_of(
            PolicyModel(llama),
            PolicyModel(llama),
            sampler=sampler,
            one=ScalarModel(llama.base_model, torch.ones(1, 16), offset=0.25),
            two=ScalarModel(llama.base_model, -torch.ones(1, 16)),
        )
        models, told = dataclasses.replace(models, tokenizer=tokenizer), []
        tracker = SimpleNamespace(metrics=lambda metrics, step: told.append((step, metrics)))
        context: Any = SimpleNamespace(device=torch.device("cpu"), tracker=tracker, is_writer=True, folder=tmp_path)
        made = Evaluator(config, context, models, rewards or reward_set(config, models))
        return SimpleNamespace(evaluate=made.evaluate, reward=made.reward, told=told)

    return make


@pytest.fixture
def answer(evaluator):
    """answer(prompts, gold=…, micro_batch_size=…) → the HeldOutResponses of that evaluator."""
    return lambda prompts=PROMPTS, **settings: evaluator(**settings).evaluate(prompts)


def test_every_prompt_has_one_answer_and_every_reward_a_score_for_it(answer):
    answers = answer()
    assert [len(values) for values in (answers.texts, answers.lengths, answers.finished, answers.kl)] == [5] * 4
    assert sorted(answers.scores) == ["reward.one", "reward.two"]
    # the second head is the first one turned round, and only the first has an offset
    assert answers.scores["reward.one"] == pytest.approx([-s - 0.25 for s in answers.scores["reward.two"]], abs=1e-5)


def test_answers_are_flagged_by_the_raw_logit_of_the_safety_model(answer):
    centred = answer().scores["reward.one"]
    logits = sorted(score + 0.25 for score in centred)
    between = (logits[1] + logits[2]) / 2  # two of the five are under it; of the centred scores it may be others
    threshold = 1 / (1 + math.exp(-between))
    assert answer(safety_threshold=threshold).flagged == [score + 0.25 < between for score in centred]
    just_above = 1 / (1 + math.exp(-(logits[0] - 0.125)))  # under every logit, over the smallest centred score
    assert not any(answer(safety_threshold=just_above).flagged)


def test_a_policy_that_is_its_own_reference_has_no_kl(answer):
    assert answer().kl == pytest.approx([0.0] * 5, abs=1e-4)


def test_the_size_of_forward_passes_changes_nothing(answer):
    one, all_at_once = answer(micro_batch_size=1), answer(micro_batch_size=5)
    assert one.texts == all_at_once.texts
    for name, scores in all_at_once.scores.items():
        assert one.scores[name] == pytest.approx(scores, abs=1e-5)


def test_gold_scores_an_answer_that_ended_and_gives_nothing_for_one_that_was_cut(answer, monkeypatch):
    asked = []

    def gold_score(prompt, text):
        asked.append((prompt, text))
        return 0.5

    monkeypatch.setattr(gold_of_the_world, "gold_score", gold_score)
    answers = answer(gold="shipped")
    assert 0 < sum(answers.finished) < 5  # both kinds are there
    assert answers.scores["gold"] == [0.5 if done else 0.0 for done in answers.finished]
    assert asked == [
        pair for pair, done in zip(zip(TEXTS, answers.texts, strict=True), answers.finished, strict=True) if done
    ]


def test_two_ranks_answer_as_one_does(answer, monkeypatch):
    """Each in a thread; what they say to one another is passed on when both have said it."""
    whole, mine, both = answer(micro_batch_size=2), threading.local(), threading.Barrier(2, timeout=60)
    said: list[Any] = [None, None]

    def gather_objects(value: Any) -> list[Any]:
        said[mine.rank] = value
        both.wait()
        heard = list(said)
        both.wait()
        return heard

    def one(rank: int) -> Any:
        mine.rank = rank
        return answer(micro_batch_size=2)

    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "rank", lambda: mine.rank)
    monkeypatch.setattr(collectives, "gather_objects", gather_objects)
    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(one, range(2)):
            for name in ("texts", "lengths", "finished", "flagged"):
                assert getattr(answers, name) == getattr(whole, name), name
            assert answers.kl == pytest.approx(whole.kl, abs=1e-4)
            for name, scores in whole.scores.items():
                assert answers.scores[name] == pytest.approx(scores, abs=1e-5)


# --- the number that chooses the best policy ------------------------------------------------------------------------


def test_the_reward_is_the_mean_of_what_ppo_maximises_and_all_figures_are_told(evaluator):
    """Helpfulness of "two" for prompts of their tag, safety of "one" for the others and for what it calls unsafe."""
    prompts = [dataclasses.replace(prompt, tag="safety" if i < 2 else "helpful") for i, prompt in enumerate(PROMPTS)]
    logits = sorted(score + 0.25 for score in evaluator().evaluate(prompts).scores["reward.one"])
    threshold = 1 / (1 + math.exp(-(logits[1] + logits[2]) / 2))
    made = evaluator(safety_threshold=threshold)
    answers = made.evaluate(prompts)
    one, two = answers.scores["reward.one"], answers.scores["reward.two"]
    expected = [o if i < 2 or answers.flagged[i] else t for i, (o, t) in enumerate(zip(one, two, strict=True))]
    assert made.reward(prompts, iteration=7) == pytest.approx(sum(expected) / 5, abs=1e-5)
    ((step, metrics),) = made.told
    assert step == 7
    assert metrics["eval/reward"] == pytest.approx(sum(expected) / 5, abs=1e-5)
    assert metrics["eval/reward_two"] == pytest.approx(sum(two) / 5, abs=1e-5)
    assert metrics["eval/kl"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["eval/flagged_safety"] == sum(answers.flagged[:2]) / 2


def own(function):
    return RewardSet({"own": FunctionReward("own", function)}, weighted_sum([2.0]))


def test_scores_that_failed_are_in_no_mean(evaluator):
    made = evaluator(rewards=own(lambda responses: [1.0, None, 3.0, math.nan, 5.0]))
    assert made.reward(PROMPTS, 1) == 2 * (1.0 + 3.0 + 5.0) / 3
    answers = made.evaluate(PROMPTS)
    assert answers.scores["reward.own"] == [1.0, None, 3.0, None, 5.0]
    assert answers.flagged is None  # no safety model
    assert made.told[0][1]["eval/reward_own"] == 3.0
    assert not any("flagged" in name for name in made.told[0][1])


def test_scores_that_all_failed_choose_no_policy(evaluator):
    with pytest.raises(UserError, match="iteration 4.* all 5 responses failed") as caught:
        evaluator(rewards=own(lambda responses: [None] * len(responses))).reward(PROMPTS, 4)
    assert caught.value.exit_code == 6


def test_each_evaluation_keeps_what_it_measured_on_every_prompt(evaluator, tmp_path) -> None:
    """The means of what is kept are the metrics; a line stands under its iteration."""
    made = evaluator()
    made.reward(PROMPTS, 4)
    made.reward(PROMPTS, 8)
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    metrics, values = made.told[0][1], lines[0]["values"]
    for name in ("reward", "reward.one", "reward.two", "kl", "length"):
        assert len(values[name]) == len(PROMPTS)
        told = metrics[f"eval/{name.replace('.', '_')}"]
        assert sum(values[name]) / len(PROMPTS) == pytest.approx(told, abs=1e-5)
    assert lines[0]["prompts"][2] == "user: say no"
