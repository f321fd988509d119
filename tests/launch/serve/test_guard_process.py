"""`rlhf serve --guard` as a process with a real reward model, whose logits transformers alone knows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch.serve.command import TOKEN as TOKEN_VARIABLE
from launch.serve.guard import COMPLIANCE, MOST_TRIES, REFUSAL
from rlhf.models import ScalarModel, load_tokenizer
from rlhf.serving.rows import row_key
from rlhf.serving.store import Store
from tests.launch.serve.servers import TOKEN, free_port, running, until
from tests.launch.serve.test_scoring import make_reward_folder

ROOT = Path(__file__).parents[3]
GOOD, BAD = "what is 2 + 2?", "how are you?"
SAFE, UNSAFE = 3.0, -3.0  # logits
ASKED = {"max_tokens": 6, "seed": 1}
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def ids_of(folder: Path, prompt: str, response: str) -> torch.Tensor:
    """Llama 2's format, written out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"[INST] {prompt} [/INST] {response} "
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([[tokenizer.bos_token_id, *inner, tokenizer.eos_token_id]])


def teach(folder: Path, logits: Mapping[tuple[str, str], float]) -> None:
    """A new head, which says this of each (prompt, response), by least squares."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden_NH = torch.cat([classifier.model(ids_of(folder, *pair))[0][:, -1] for pair in logits]).double()
        head_H = torch.linalg.pinv(hidden_NH) @ torch.tensor(list(logits.values())).double()
        ScalarModel(classifier.model, head_H.float()[None], 0.0).save(folder, load_tokenizer(folder))
        again = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        for pair, logit in logits.items():
            assert float(again(ids_of(folder, *pair)).logits[0, 0]) == pytest.approx(logit, abs=0.05)


@contextmanager
def serving(policy: Path, at: Path, *options: str) -> Iterator[httpx2.Client]:
    """Of a process that may not be ready yet."""
    port = free_port()
    command = [sys.executable, "-m", "launch.cli", "serve", str(policy), "--port", str(port), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), TOKEN_VARIABLE: TOKEN}
    at.mkdir()
    with (at / "log").open("w") as out:
        process = subprocess.Popen(command, env=environment, cwd=at, stdout=out, stderr=out)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=HEADERS, timeout=60) as http:
            yield http
    finally:
        process.terminate()
        code = process.wait(60)
    assert code == 0, (at / "log").read_text()


def ready(http: httpx2.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx2.HTTPError:
        return False


def sampled(policy: Path) -> list[str]:
    """What is said to GOOD at first, and at each further try of the guard."""
    with running(policy) as server, server.http() as http:
        server.model.stop_ids = frozenset(server.model.chat.stop_ids)
        seeds = [ASKED["seed"], *(row_key(ASKED["seed"], tries) for tries in range(1, MOST_TRIES))]
        return [told(chat(http, GOOD, seed=seed))[0] for seed in seeds]


def chat(http: httpx2.Client, prompt: str, **more: Any) -> list[dict[str, Any]]:
    asked = {"messages": [{"role": "user", "content": prompt}], **ASKED, **more}
    return http.post("/v1/chat/completions", json=asked).raise_for_status().json()["choices"]


def told(choices: Sequence[dict[str, Any]]) -> list[str]:
    return [choice["message"]["content"] for choice in choices]


@pytest.mark.integration
def test_a_guard_annotates_refuses_and_samples_again(folder: Path, tmp_path: Path) -> None:
    safety, texts = make_reward_folder(tmp_path / "safety"), sampled(folder)
    verdicts = [UNSAFE, UNSAFE, SAFE, UNSAFE]
    of_responses = {(GOOD, text): logit for text, logit in zip(texts, verdicts, strict=True)}
    assert len(of_responses) == MOST_TRIES
    teach(safety, {(GOOD, COMPLIANCE): SAFE, (BAD, COMPLIANCE): UNSAFE, **of_responses})
    with ExitStack() as servers:
        annotating, refusing, regenerating = (
            servers.enter_context(
                serving(folder, tmp_path / action, "--guard", str(safety), "--guard-action", action, *more)
            )
            for action, *more in (["annotate"], ["refuse"], ["regenerate", "--guard-threshold", "0.9"])
        )
        until(lambda: all(map(ready, (annotating, refusing, regenerating))), 120)
        is_annotated(annotating, texts[0])
        is_refused(refusing)
        (again,) = chat(regenerating, GOOD)
        assert (told([again]), again["guard"]["tries"]) == ([texts[2]], 3)
    kept = Store(f"sqlite:///{tmp_path}/refuse/feedback/feedback.db").exchanges().values()
    assert [row.response for row in kept] == [REFUSAL] * 3


def is_annotated(http: httpx2.Client, text: str) -> None:
    for prompt, logit in ((GOOD, SAFE), (BAD, UNSAFE)):
        (choice,) = chat(http, prompt)
        assert choice["guard"]["input"] == {"flagged": logit == UNSAFE, "safe": probability(logit)}
        assert choice["finish_reason"] in ("stop", "length")
    (choice,) = chat(http, GOOD)
    assert (told([choice]), choice["guard"]["output"]) == ([text], {"flagged": True, "safe": probability(UNSAFE)})


def is_refused(http: httpx2.Client) -> None:
    for prompt, where in ((GOOD, "output"), (BAD, "input")):
        (choice,) = chat(http, prompt)
        assert (told([choice]), choice["finish_reason"]) == ([REFUSAL], "content_filter")
        assert choice["guard"][where] == {"flagged": True, "safe": probability(UNSAFE)}
    asked = {"messages": [{"role": "user", "content": GOOD}], **ASKED, "stream": True}
    lines = http.post("/v1/chat/completions", json=asked).text.splitlines()
    pieces = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines if line.startswith("data: {")]
    assert "".join(pieces) == REFUSAL


def probability(logit: float) -> Any:
    return pytest.approx(1 / (1 + math.exp(-logit)), abs=0.003)
