"""`rlhf evaluate policy`: responses of several policies to the same prompts, and what they are worth."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from launch import cli
from launch.evaluate.policy.evaluate import evaluate, load_prompts
from launch.evaluate.policy.policies import Settings
from rlhf.config import TrackingConfig
from rlhf.models import load_tokenizer
from rlhf.tracking import fill_in
from tests.launch.small_policies import ROWS, command, make_folders, read, write


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("models"))


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
