"""Held-out answers: in the order of their prompts, judged as they are, whatever the layout."""

import copy
import math

import pytest
import torch

from reward_data import Message, Prompt
from rlhf.config import (
    DataConfig,
    HardwareConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RoleConfig,
    RunConfig,
    SamplingConfig,
    TinyConfig,
)
from rlhf.distributed import collectives
from rlhf.distributed.engine import LocalEngine
from rlhf.generation import InProcessSampler
from rlhf.models import ScalarModel
from rlhf.models.policy import PolicyModel
from rlhf.models.tiny import train_tokenizer, untrained_llama
from rlhf.ppo.held_out import answer_held_out

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
def answer(tokenizer, llama):
    """answer(prompts, gold=…, micro_batch_size=…) by the model, with two judges and the model as its own reference."""

    def frozen(module):
        return LocalEngine(module, None, 1, HardwareConfig())

    rewards = {
        "one": frozen(ScalarModel(llama.base_model, torch.ones(1, 16), offset=0.25)),
        "two": frozen(ScalarModel(llama.base_model, -torch.ones(1, 16))),
    }

    def run(prompts=PROMPTS, gold=None, **settings):
        ppo = PPOConfig(
            helpfulness_model="one",
            safety_model="one",
            max_prompt_length=64,
            sampling=SamplingConfig(max_new_tokens=6, batch_size=2, temperature=0.9),
        )
        data = DataConfig(demonstrations=EMPTY, preferences=EMPTY, prompts=EMPTY)
        config = RunConfig(name="x", data=data, reward=MODELS, ppo=ppo.model_copy(update=settings))
        sampler = InProcessSampler(copy.deepcopy(llama), [tokenizer.eos_token_id], tokenizer.pad_token_id)
        reference = frozen(PolicyModel(llama))
        return answer_held_out(config, sampler, tokenizer, prompts, rewards, reference, torch.device("cpu"), gold)

    return run


def test_every_prompt_has_one_answer_and_every_judge_a_score_for_it(answer):
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


def test_gold_scores_an_answer_that_ended_and_gives_nothing_for_one_that_was_cut(answer):
    asked = []

    def gold(prompt, text):
        asked.append((prompt, text))
        return 0.5

    answers = answer(gold=gold)
    assert 0 < sum(answers.finished) < 5  # both kinds are there
    assert answers.scores["gold"] == [0.5 if done else 0.0 for done in answers.finished]
    assert asked == [
        pair for pair, done in zip(zip(TEXTS, answers.texts, strict=True), answers.finished, strict=True) if done
    ]


def test_two_ranks_answer_as_one_does(answer, monkeypatch):
    whole, shares = answer(), []
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "join_shards", lambda values, total: values)
    monkeypatch.setattr(collectives, "gather_objects", lambda value: [value, value])
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        shares.append(answer())
    assert [text for share in shares for text in share.texts][:5] == whole.texts
    assert [s for share in shares for s in share.scores["reward.one"]][:5] == pytest.approx(
        whole.scores["reward.one"], abs=1e-5
    )
