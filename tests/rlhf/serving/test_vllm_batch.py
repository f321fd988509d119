"""vLLM behind the served model: it samples what our own engine samples, and says the same of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.config import TinyConfig
from rlhf.models import save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama
from rlhf.serving.model import Ask, ServedModel
from rlhf.serving.rows import Sampling
from tests.rlhf.serving.models import TEXTS, Asked, finishes

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make vllm installs it"),
]
SMALLEST_HEADS = TinyConfig(hidden_size=64, intermediate_size=64, layers=2, heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("vllm") / "model", train_tokenizer(TEXTS, 300)
    model = untrained_llama(SMALLEST_HEADS, tokenizer, 0)
    with torch.no_grad():
        model.lm_head.weight *= 20  # opinions, so that rounding changes no greedy token
    save_causal(model, folder, tokenizer)
    return folder


def started(folder: Path, engine: str) -> ServedModel:
    model = ServedModel("tiny", folder, 200, engine=engine)  # type: ignore[arg-type]
    model.engine.start()
    return model


@pytest.fixture(scope="module")
def own(folder: Path) -> Iterator[ServedModel]:
    model = started(folder, "own")
    yield model
    model.engine.close()


@pytest.fixture(scope="module")
def vllm(folder: Path) -> Iterator[ServedModel]:
    """Nothing is compiled: that takes longer than these tests."""
    with torch._dynamo.config.patch(disable=True):
        model = started(folder, "vllm")
        yield model
        model.engine.close()


def ask(model: ServedModel, *texts: str, n: int = 1, stop: tuple[str, ...] = (), **sampling: float) -> Ask:
    settings = Sampling(**{"max_tokens": 12, "temperature": 0.0} | sampling)  # type: ignore[arg-type]
    return Ask([model.encode_text(text) for text in texts], settings, n=n, seed=3, stop=stop)


def answered(model: ServedModel, asked: Ask) -> tuple[list[str], list[str | None]]:
    found = Asked(model, asked).send()
    return found.wait(), finishes(found)


def test_greedy_responses_are_those_of_our_engine(own: ServedModel, vllm: ServedModel) -> None:
    texts = ["hello there", "what is 2 + 2?", "hello " * 30, "it is 4"]
    expected = answered(own, ask(own, *texts))
    assert answered(vllm, ask(vllm, *texts)) == expected
    assert any(expected[0])


def test_a_stop_text_and_a_stop_token_end_a_response(own: ServedModel, vllm: ServedModel) -> None:
    (whole,), _ = answered(own, ask(own, "hello there"))
    stop = whole[len(whole) // 2 :][:3]
    expected = answered(own, ask(own, "hello there", stop=(stop,)))
    assert expected[1] == ["stop"] and answered(vllm, ask(vllm, "hello there", stop=(stop,))) == expected
    sampled = Asked(own, ask(own, "hello there", top_logprobs=1)).send()
    sampled.wait()
    tokens = [each.token for piece in sampled.pieces[0] for each in piece.logprobs]
    token = tokens[len(tokens) // 2]
    found = []
    for model in (own, vllm):
        kept, model.stop_ids = model.stop_ids, frozenset([token])
        found.append(answered(model, ask(model, "hello there")))
        model.stop_ids = kept
    assert found[0] == found[1] and found[0][1] == ["stop"]


def test_logprobs_are_the_models_own(own: ServedModel, vllm: ServedModel) -> None:
    def told(model: ServedModel) -> list[tuple[float, list[tuple[int, float]]]]:
        asked = Asked(model, ask(model, "hello there", top_logprobs=3, max_tokens=5)).send()
        asked.wait()
        return [(each.logprob, each.top) for piece in asked.pieces[0] for each in piece.logprobs]

    expected, found = told(own), told(vllm)
    assert len(found) == len(expected) > 0
    for (logprob, top), (of_own, top_of_own) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(of_own, abs=1e-3)
        assert [value for _, value in top] == pytest.approx([value for _, value in top_of_own], abs=1e-3)


def test_seeds_make_the_same_responses_and_n_of_them_differ(vllm: ServedModel) -> None:
    asked = ask(vllm, "hello there", n=4, temperature=1.5)
    texts, _ = answered(vllm, asked)
    assert answered(vllm, asked)[0] == texts and len(set(texts)) > 1
    narrow, _ = answered(vllm, ask(vllm, "hello there", n=3, temperature=1.5, top_p=0.0))
    assert len(set(narrow)) == 1


def test_a_cancelled_row_frees_its_slot_and_a_failure_is_told(
    vllm: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = Asked(vllm, ask(vllm, *["hello"] * 3, max_tokens=4000)).send()
    vllm.engine.cancel(endless.rows)
    assert answered(vllm, ask(vllm, "hello there"))[1] != ["failed"]
    assert vllm.engine.running == 0
    batch = vllm.engine._batch
    monkeypatch.setattr(batch, "step", lambda: 1 / 0)
    assert answered(vllm, ask(vllm, "hello there"))[1] == ["failed"]
