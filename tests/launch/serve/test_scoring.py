from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch.serve.scoring import RewardModel
from rlhf.config import TinyConfig
from rlhf.errors import UserError
from rlhf.models import ScalarModel
from rlhf.models.tiny import POSITIONS, train_tokenizer, untrained_llama
from tests.rlhf.serving.models import TEXTS, make_folder

OFFSET = 0.25
PROMPT = [{"role": "user", "content": "what is 2 + 2?"}]


def make_reward_folder(folder: Path, offset: float = OFFSET) -> Path:
    """A reward model with random weights, centred at `offset`."""
    tokenizer = train_tokenizer(TEXTS, 300)
    causal = untrained_llama(TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2), tokenizer, seed=0)
    head_1H = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    ScalarModel(causal.base_model, head_1H, offset).save(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_folder(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture
def model(folder: Path) -> Iterator[RewardModel]:
    found = RewardModel(folder)
    yield found
    found.close()


def plain_logit(folder: Path, response: str) -> float:
    """By transformers alone, with the format written out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    text = f"[INST] {PROMPT[0]['content']} [/INST] {response} "
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        return float(classifier(torch.tensor([ids])).logits[0, 0])


def test_many_at_once_have_the_score_that_each_has_alone(folder: Path, model: RewardModel) -> None:
    responses = ["it is 4 " * n + "." for n in range(1, 41)]
    futures = [model.submit(PROMPT, response) for response in responses]
    for response, future in list(zip(responses, futures, strict=True))[::7]:
        found = future.result(60)
        assert found.logit == pytest.approx(plain_logit(folder, response.strip()), abs=1e-4)
        assert found.value == pytest.approx(found.logit - OFFSET, abs=1e-6)


def test_what_the_model_cannot_hold_is_refused_and_the_next_is_scored(model: RewardModel) -> None:
    with pytest.raises(UserError, match="positions"):
        model.submit(PROMPT, "4 " * POSITIONS)
    with pytest.raises(UserError):
        model.submit([], "it is 4")
    model.submit(PROMPT, "gone").cancel()
    assert model.submit(PROMPT, "it is 4").result(60)


def test_a_failure_is_told_to_those_who_wait_and_the_thread_goes_on(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model._model, "score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.submit(PROMPT, "it is 4").result(60)
        patch.setattr(model._model, "score", lambda tokens, _: torch.full((len(tokens),), float("nan")))
        with pytest.raises(ArithmeticError):
            model.submit(PROMPT, "it is 4").result(60)
    assert model.submit(PROMPT, "it is 4").result(60)


def test_a_policy_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reward model"):
        RewardModel(make_folder(tmp_path / "policy"))
