"""`rlhf evaluate policy`: responses of several policies to the same prompts, and what they are worth."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

import pytest
import torch

from launch import cli
from launch.evaluate.policy.evaluate import evaluate, load_prompts
from launch.evaluate.policy.policies import Settings
from rlhf.config import TinyConfig, TrackingConfig
from rlhf.models import ScalarModel, load_tokenizer, save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama
from rlhf.tracking import fill_in
from tests.launch.chat_server import Reply, Request, chat, chat_server

TEXTS = ["what is 2 + 2? it is 4", "sort the words: pear, apple. apple, pear", "say hello. hello!"] * 20
SIZE = TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2)
REWARDS = """
def words(prompts, responses):
    return [len(response.split()) for response in responses]

def ended(responses, finished):
    return [float(done) for done in finished]

def half(responses):
    return [None if n % 2 else 1.0 for n in range(len(responses))]

def asks(responses, answer):
    return [0.0 for _ in responses]
"""
ROWS = [
    {"messages": [{"role": "user", "content": f"question {n}"}], "tag": ("helpful", "safety")[n % 2]} for n in range(12)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two policies and a reward model with random weights, and a file of functions."""
    root, tokenizer = tmp_path_factory.mktemp("models"), train_tokenizer(TEXTS, 300)
    found = {name: str(root / name) for name in ("one", "two", "reward")}
    for seed, name in enumerate(("one", "two")):
        save_causal(untrained_llama(SIZE, tokenizer, seed), found[name], tokenizer)
    head_1H = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    ScalarModel(untrained_llama(SIZE, tokenizer, 5).base_model, head_1H).save(found["reward"], tokenizer)
    (root / "mine.py").write_text(REWARDS)
    write(root / "prompts.jsonl", ROWS)
    return found | {"code": str(root / "mine.py"), "prompts": str(root / "prompts.jsonl")}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(*arguments: object, uri: str = "null") -> int:
    shown = ["evaluate", "policy", *map(str, arguments), "--max-new-tokens", "8", "--tracking-uri", uri]
    return cli.main(shown)


def read(out: Path) -> tuple[dict, list[dict]]:
    lines = (out / "responses.jsonl").read_text().splitlines()
    return json.loads((out / "report.json").read_text()), [json.loads(line) for line in lines]


def test_the_report_counts_the_responses_that_are_written(folders: dict[str, str], tmp_path: Path) -> None:
    out, words = tmp_path / "out", f"words={folders['code']}:words"
    models, prompts = [folders["one"], folders["two"]], folders["prompts"]
    assert command(*models, "--prompts", prompts, "--out", out, "--reward", words, "--samples", 2) == 0
    report, lines = read(out)
    assert len(lines) == 2 * 12 * 2
    of = {name: [line for line in lines if line["model"] == name] for name in ("one", "two")}
    for name, own in of.items():
        found = report["models"][name]
        assert found["rewards"]["words"]["value"] == pytest.approx(sum(len(o["response"].split()) for o in own) / 24)
        assert found["length"]["value"] == pytest.approx(sum(o["length"] for o in own) / 24)
        assert found["eos_rate"]["value"] == pytest.approx(sum(o["finished"] for o in own) / 24)
        safety = [len(o["response"].split()) for o in own if o["prompt"] % 2]
        assert found["by_tag"]["safety"]["rewards"]["words"]["value"] == pytest.approx(sum(safety) / 12)
    pair = report["pairs"]["one vs two"]["words"]
    scores = [(a["scores"]["words"], b["scores"]["words"]) for a, b in zip(of["one"], of["two"], strict=True)]
    assert pair["win_rate"]["value"] == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in scores) / 24)
    assert pair["ties"]["value"] == pytest.approx(sum(a == b for a, b in scores) / 24)
    assert pair["difference"]["value"] == pytest.approx(sum(a - b for a, b in scores) / 24)
    assert pair["difference"]["n"] == 24
    assert {line["messages"][0]["content"] for line in lines} == {f"question {n}" for n in range(12)}


def test_a_reward_model_scores_what_was_said(folders: dict[str, str], tmp_path: Path) -> None:
    """As it scores the ids of prompt and response, EOS only where there is one, put together by hand."""
    rewards = {"model": folders["reward"]}
    evaluate({"one": folders["one"]}, load_prompts([folders["prompts"]]), rewards, Settings(max_new_tokens=8), tmp_path)
    _, lines = read(tmp_path)
    tokenizer = load_tokenizer(folders["reward"])
    from rlhf.models import load_reward_scalar

    scalar = load_reward_scalar(Path(folders["reward"])).eval()
    for line in lines:
        text = f"[INST] {line['messages'][0]['content']} [/INST] {line['response']} "
        ids = [
            tokenizer.bos_token_id,
            *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        ]
        ids += [tokenizer.eos_token_id] * line["finished"]
        with torch.no_grad():
            score = scalar.score(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        assert line["scores"]["model"] == pytest.approx(float(score), abs=1e-5)


def test_a_policy_ties_with_itself(folders: dict[str, str], tmp_path: Path) -> None:
    """All policies use the same random numbers, whatever the size of a batch."""
    prompts, words = load_prompts([folders["prompts"]]), {"words": f"{folders['code']}:words"}
    same = {"a": folders["one"], "b": folders["one"]}
    report = evaluate(same, prompts, words, Settings(max_new_tokens=8, batch_size=2))
    assert report["pairs"]["a vs b"]["words"]["ties"]["value"] == 1.0
    assert report["models"]["a"] == report["models"]["b"]
    other = evaluate(same, prompts, words, Settings(max_new_tokens=8, batch_size=64))
    assert other["models"]["a"]["rewards"] == report["models"]["a"]["rewards"]
    reseeded = evaluate(same, prompts, words, Settings(max_new_tokens=8, seed=1))
    assert reseeded["models"]["a"]["rewards"] != report["models"]["a"]["rewards"]


def test_failed_scores_are_counted_and_left_out(folders: dict[str, str], tmp_path: Path) -> None:
    rewards = {"half": f"{folders['code']}:half"}
    prompts = load_prompts([folders["prompts"]])
    policies = {"one": folders["one"], "two": folders["two"]}
    report = evaluate(policies, prompts, rewards, Settings(max_new_tokens=4))
    assert report["models"]["one"]["failed"] == {"half": 6}
    assert report["models"]["one"]["rewards"]["half"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 6}
    assert report["pairs"]["one vs two"]["half"]["win_rate"]["n"] == 6


def test_the_page_and_mlflow_have_the_same_values(folders: dict[str, str], tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri, out, words = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mine", f"words={folders['code']}:words"
    models = [folders["one"], folders["two"]]
    assert command(*models, "--prompts", folders["prompts"], "--out", out, "--reward", words, uri=uri) == 0
    report, _ = read(out)
    fill_in(out / "tracking", TrackingConfig(uri=uri))
    client = MlflowClient(uri)
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments(filter_string="name = 'rlhf'")])
    value = report["models"]["two"]["rewards"]["words"]["value"]
    assert run.data.metrics["two/rewards.words"] == pytest.approx(value)
    win_rate = report["pairs"]["one vs two"]["words"]["win_rate"]["value"]
    assert run.data.metrics["one_vs_two/words.win_rate"] == pytest.approx(win_rate)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert f"{value:.2f} [" in page and f"{value:.2f} [" in text
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["./nowhere", "--prompts", "PROMPTS"], 4, "there is no model folder"),
        (["ONE", "--prompts", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["ONE", "ONE", "--prompts", "PROMPTS"], 2, "a model is named twice"),
        (["ONE", "--prompts", "PROMPTS", "--reward", "words"], 2, "--reward words: give NAME=FOLDER"),
        (["ONE", "--prompts", "PROMPTS", "--reward", "a=CODE:none"], 2, "--reward a: "),
        (["ONE", "--prompts", "PROMPTS", "--reward", "a=CODE:asks"], 2, "asks for answer"),
        (["ONE", "--prompts", "PROMPTS", "--reward", "a=./nowhere"], 4, "there is no model folder"),
        (["ONE", "--prompts", "PROMPTS", "--reward", "a=ONE"], 4, "is no reward model"),
        (["ONE", "--prompts", "LONG"], 3, "prompt and response may need"),
        (["ONE", "--prompts", "LONG", "--bad-rows", "skip"], 3, "prompt and response may need"),
    ],
)
def test_what_cannot_be_evaluated_is_told(
    arguments: list[str],
    code: int,
    text: str,
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {
        "ONE": folders["one"],
        "PROMPTS": folders["prompts"],
        "CODE": folders["code"],
        "LONG": write(tmp_path / "long.jsonl", [{"prompt": "word " * 9000}]),
    }
    filled = [re.sub("ONE|PROMPTS|CODE|LONG", lambda found: words[found[0]], word) for word in arguments]
    assert command(*filled, "--out", tmp_path / "out") == code
    shown = capsys.readouterr().err
    assert text in shown and "Traceback" not in shown


def test_prompts_that_do_not_fit_can_be_left_out(folders: dict[str, str], tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 9000}]}
    file, out = write(tmp_path / "some.jsonl", [ROWS[0], long, ROWS[2]]), tmp_path / "out"
    assert command(folders["one"], "--prompts", file, "--out", out, "--bad-rows", "skip") == 0
    report, lines = read(out)
    assert report["models"]["one"]["responses"] == len(lines) == 2
    assert report["models"]["one"]["left_out"]["responses"] == 1
    assert [line["prompt"] for line in lines] == [0, 2]


def made_run(folder: Path, gold: list[float]) -> str:
    """The folder of a run whose reward rises; an iteration that was evaluated again after a resume stands there twice."""
    (folder / "ppo").mkdir(parents=True)
    lines = []
    for number, level in [(0, gold[0]), (1, -9.0), *enumerate(gold[1:], 1)]:
        spread = [n % 7 / 70 for n in range(40)]
        values = {
            "reward": [number + one for one in spread],
            "gold": [level + one for one in spread],
            "kl": [number / 2] * 40,
            "length": [20] * 40,
        }
        lines.append({"step": 4 * number, "prompts": [f"user: {n}" for n in range(40)], "values": values})
    write(folder / "ppo" / "evaluations.jsonl", lines)
    return str(folder)


def test_the_checkpoints_of_a_run_show_over_optimisation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [made_run(tmp_path / "runs" / "bad", [0, 2, 1]), made_run(tmp_path / "runs" / "good", [0, 1, 2])]
    out = tmp_path / "out"
    assert cli.main(["evaluate", "policy", *runs, "--checkpoints", "--out", str(out), "--tracking-uri", "null"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    report = json.loads((out / "report.json").read_text())
    bad, good = report["runs"]["bad"], report["runs"]["good"]
    assert [one["step"] for one in bad["evaluations"]] == [0, 4, 8]
    assert bad["evaluations"][1]["gold"]["value"] == pytest.approx(2 + sum(n % 7 for n in range(40)) / 2800)
    assert bad["evaluations"][2]["kl"]["value"] == 1.0
    assert bad["over_optimization"]["falls"] and bad["over_optimization"]["truth"]["value"] == pytest.approx(-1)
    assert not good["over_optimization"]["shown"]
    assert "4 to 8" in shown and "8 to 8" in shown
    assert (out / "report.html").read_text().count("<svg") == 2


def test_checkpoints_need_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["evaluate", "policy", str(tmp_path), "--checkpoints", "--out", out, "--tracking-uri", "null"]) == 4
    assert "evaluations.jsonl; give the folder of a run" in capsys.readouterr().err
    assert command(str(tmp_path), "--out", out) == 2
    assert "--prompts FILE is missing" in capsys.readouterr().err


def test_kl_to_itself_is_0_and_to_another_is_not(folders: dict[str, str], tmp_path: Path) -> None:
    """The sampler's logprobs against one forward pass of the reference, at every temperature."""
    prompts, policies = load_prompts([folders["prompts"]]), {"one": folders["one"], "two": folders["two"]}
    settings = Settings(samples=2, max_new_tokens=8, more_temperatures=(0.5,), reference=folders["one"])
    report = evaluate(policies, prompts, {"words": f"{folders['code']}:words"}, settings)
    for of_temperature in report["models"]["one"]["by_temperature"].values():
        assert abs(of_temperature["kl"]["value"]) < 1e-4
    assert report["models"]["two"]["kl"]["value"] > 1e-3
    assert set(report["models"]["one"]["by_temperature"]) == {"0.5", "1"}
    assert [point["size"] for point in report["models"]["one"]["best_of_n"]["words"]["words"]] == [1, 2]
    assert set(report["models"]["one"]["refusals"]) == {"unsafe", "harmless"}


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
