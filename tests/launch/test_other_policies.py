"""Policies from elsewhere beside ours: behind an endpoint, from a hub; and a judge that compares them."""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf.config import TrackingConfig
from rlhf.tracking import fill_in
from tests.launch.chat_server import Reply, Request, chat, chat_server
from tests.launch.small_policies import ROWS, command, make_folders, read, write
from tests.rlhf.chat.templates import tokenizer_with


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("models"))


def test_a_policy_behind_an_endpoint_stands_beside_ours(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failures are counted, left out and shown; the key is in no file."""
    key = f"sk-{secrets.token_hex(8)}"  # not a literal: MLflow keeps the diff of this file
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def answer(request: Request) -> Reply:
        number = int(request.body["messages"][-1]["content"].removeprefix("question "))
        if number == 3:
            return Reply(f"refused for {request.key}".encode(), 400)
        return chat("one two three", None if number == 4 else 10 + number, "length" if number == 5 else "stop")

    out, uri = tmp_path / "out", f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = f"words={folders['code']}:words"
    with chat_server(answer) as server:
        models = [folders["one"], f"openai:big/model@{server.url}"]
        arguments = ["--prompts", folders["prompts"], "--reward", words, "--samples", 2, "--temperature", 0.5]
        assert command(*models, *arguments, "--out", out, uri=uri) == 0
    report, lines = read(out)
    found = report["models"]["model"]
    assert found["model"] == models[1] and found["responses"] == 22
    assert (
        found["left_out"]["responses"] == 2 and "status 400: refused for Bearer ***" in found["left_out"]["reasons"][0]
    )
    assert found["length"] == pytest.approx(
        {**found["length"], "value": sum(10 + n for n in range(12) if n not in (3, 4)) / 10, "n": 20}
    )
    assert found["eos_rate"]["value"] == pytest.approx(10 / 11) and found["rewards"]["words"]["value"] == 3
    assert report["pairs"]["one vs model"]["words"]["win_rate"]["n"] == 22
    assert [point["size"] for point in found["best_of_n"]["words"]["words"]] == [1, 2]
    assert sum(line["model"] == "model" for line in lines) == 22
    (body,) = [request.body for request in server.requests if request.body["seed"] == 0]
    assert body == {
        "model": "big/model",
        "messages": ROWS[0]["messages"],
        "temperature": 0.5,
        "max_tokens": 8,
        "seed": 0,
    }
    assert len({request.body["seed"] for request in server.requests}) == 24
    assert "2 responses left out" in capsys.readouterr().err
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert key.encode() not in written and b"big/model" in written


def test_an_endpoint_tells_no_tokens_so_there_is_no_kl(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompts", folders["prompts"], "--out", tmp_path / "out", "--reference", folders["one"]]
    assert command("openai:m@http://127.0.0.1:1/v1", *arguments) == 2
    assert "tells no tokens, so it has no KL" in capsys.readouterr().err
    assert command("openai:m@127.0.0.1", *arguments) == 2
    assert "give MODEL@URL" in capsys.readouterr().err


def judgement(request: Request) -> Reply:
    """Prefers what comes later in the alphabet; question 2 by position, to question 4 there is no verdict, and 6 fails."""
    asked = request.body["messages"][-1]["content"]
    number = int(re.findall(r"user: question (\d+)", asked)[0])
    a, b = re.findall(r"<response [AB]>\n(.*?)\n</response [AB]>", asked, re.DOTALL)
    if number == 6:
        return Reply(b"overloaded prompt", 400)
    choice = {2: "A", 4: "?"}.get(number) or ("C" if a == b else "AB"[b > a])
    return chat(f"By the alphabet: [[{choice}]]")


def test_a_judge_compares_in_both_orders(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_JUDGE_API_KEY", "of the judge")
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path / 'mlflow.db'}"
    with chat_server(judgement) as server:
        models = [folders["one"], folders["two"]]
        arguments = ["--prompts", folders["prompts"], "--reward", f"words={folders['code']}:words", "--out", out]
        assert command(*models, *arguments, "--judge", f"big/judge@{server.url}", uri=uri) == 0
    assert {request.key for request in server.requests} == {"Bearer of the judge"}
    assert {request.body["temperature"] for request in server.requests} == {0}
    report, lines = read(out)
    texts = {name: [line["response"] for line in lines if line["model"] == name] for name in ("one", "two")}
    wins = [(a > b) + (a == b) / 2 for a, b in zip(texts["one"], texts["two"], strict=True)]
    wins[2] = 0.5  # the orders disagree
    known = [n for n in range(12) if n not in (4, 6)]
    found = report["pairs"]["one vs two"]["judge"]
    assert found["failed"] == 2 and "no verdict" in found["reasons"][0] and "status 400" in found["reasons"][1]
    assert found["win_rate"]["value"] == pytest.approx(sum(wins[n] for n in known) / 10)
    assert found["orders_agree"]["value"] == pytest.approx(9 / 10)
    judgements = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in judgements] == [n for n in range(12) if n != 6]
    assert judgements[2]["verdicts"] == ["A", "A"] and judgements[4]["verdicts"] is None
    fill_in(out / "tracking", TrackingConfig(uri=uri))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments(filter_string="name = 'rlhf'")])
    assert run.data.metrics["one_vs_two/judge.win_rate"] == pytest.approx(found["win_rate"]["value"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ((out / "report.html").read_text(), (out / "report.md").read_text(), shown):
        assert (
            "Pairs by judge" in text and "both orders agree" in text and "the response shown first is preferred" in text
        )


@pytest.mark.parametrize(
    ("models", "arguments", "text"),
    [
        (["one"], ["--judge", "m@http://h/v1"], "compares two policies or more"),
        (["one", "two"], ["--judge", "m"], "--judge: give MODEL@URL"),
        (["one", "two"], ["--judge", "m@http://h/v1", "--reward", "judge=CODE:words"], "--reward judge: "),
    ],
)
def test_a_judge_that_cannot_compare_is_told(
    models: list[str],
    arguments: list[str],
    text: str,
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [word.replace("CODE", folders["code"]) for word in arguments]
    assert command(*(folders[m] for m in models), "--prompts", folders["prompts"], "--out", tmp_path / "o", *given) == 2
    assert text in capsys.readouterr().err


def test_a_hub_model_reads_its_own_template(folders: dict[str, str], tmp_path: Path) -> None:
    """As transformers writes the prompt and generates; ours beside it reads the form of Llama 2."""
    tokenizer = tokenizer_with("chatml")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # so that it does not repeat one token
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hub")
    tokenizer.save_pretrained(tmp_path / "hub")
    system = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]}
    prompts, out = write(tmp_path / "prompts.jsonl", [*ROWS[:3], system]), tmp_path / "out"
    models = [tmp_path / "hub", folders["one"]]
    assert command(*models, "--prompts", prompts, "--temperature", 1e-4, "--out", out) == 0
    _, lines = read(out)
    model, own = AutoModelForCausalLM.from_pretrained(tmp_path / "hub"), AutoTokenizer.from_pretrained(tmp_path / "hub")
    of_hub = [line for line in lines if line["model"] == "hub"]
    assert len(of_hub) == 4 and len(lines) == 8
    for line in of_hub:
        ids = own.apply_chat_template(
            line["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            said = cast(Any, model).generate(**ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[
                0, ids["input_ids"].shape[1] :
            ]
        assert line["response"].strip() == own.decode(said, skip_special_tokens=True).strip()
        assert line["length"] == len(said)
    assert len({line["response"] for line in of_hub}) > 1


def test_tasks_of_lm_eval_stand_in_the_report(folders: dict[str, str], tmp_path: Path) -> None:
    """Both choices are the same text, of which the first is taken: right in three of four questions."""
    pytest.importorskip("lm_eval")
    rows = [{"question": f"question {n}", "choices": ["it is 4", "it is 4"], "label": n // 3} for n in range(4)]
    data = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "toy.yaml").write_text(
        "task: toy\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "out"
    arguments = ["--prompts", folders["prompts"], "--tasks", tmp_path / "toy.yaml", "--out", out]
    assert command(folders["one"], *arguments) == 0
    found = read(out)[0]["models"]["one"]["tasks"]["toy"]["acc"]
    half = 1.96 * (0.75 * 0.25 / 3) ** 0.5  # of the unbiased variance over four rows
    assert found == pytest.approx({"value": 0.75, "low": 0.75 - half, "high": 0.75 + half, "n": 4})
    assert "Tasks of lm-eval" in (out / "report.html").read_text()
    assert command(folders["one"], "--prompts", folders["prompts"], "--tasks", "no_such_task", "--out", out) == 2


def test_tasks_without_lm_eval_are_told(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else usual(name))
    assert command(folders["one"], "--prompts", folders["prompts"], "--tasks", "hellaswag", "--out", tmp_path) == 2
    assert "pip install 'rlhf-pipeline[eval]'" in capsys.readouterr().err
