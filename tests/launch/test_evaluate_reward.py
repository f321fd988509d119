"""`rlhf evaluate reward`: one command from models and data to a report, whose figures are those of `rlhf score`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch import cli
from rlhf.config import TinyConfig, TrackingConfig
from rlhf.errors import UserError
from rlhf.models import ScalarModel, load_tokenizer, save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama
from rlhf.tracking import fill_in
from tests.faults.runs import named, rlhf, wait_for

TEXTS = ["what is 2 + 2? it is 4", "sort the words: pear, apple. apple, pear", "say hello. hello!"] * 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two reward models with random weights."""
    tokenizer, folders = train_tokenizer(TEXTS, 300), []
    for seed in (0, 1):
        causal = untrained_llama(TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2), tokenizer, seed)
        head_1H = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
        folders.append(str(tmp_path_factory.mktemp("reward") / f"model-{seed}"))
        ScalarModel(causal.base_model, head_1H).save(folders[-1], tokenizer)
    return folders


def pair(n: int, rating: str = "better") -> dict:
    prompt = [{"role": "user", "content": f"question {n // 2}"}]
    answers = {"chosen": "good " * (n % 5 + 1) + str(n), "rejected": f"bad {n % 7}"}
    return {"prompt": prompt, **answers, "rating": rating, "tag": ("helpful", "safety")[n % 2]}


PAIRS = [pair(n, ("better", "slightly", "unrated")[n % 3]) for n in range(40)]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(*arguments: object, uri: str = "null") -> int:
    return cli.main(["evaluate", "reward", *map(str, arguments), "--tracking-uri", uri])


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_the_report_counts_what_rlhf_score_says(models: list[str], tmp_path: Path) -> None:
    file, out = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out"
    assert evaluate(models[0], file, "--out", out) == 0
    assert cli.main(["score", models[0], file, "--out", str(tmp_path / "scores.jsonl")]) == 0
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    report, wins = report_of(out), [line["margin"] > 0 for line in scored]
    assert report["accuracy"]["value"] == pytest.approx(sum(wins) / 40)
    assert report["accuracy"]["n"] == report["pairs"] == 40
    assert report["accuracy"]["low"] < report["accuracy"]["value"] < report["accuracy"]["high"]
    slightly = [win for win, row in zip(wins, PAIRS, strict=True) if row["rating"] == "slightly"]
    assert report["by_rating"]["slightly"]["value"] == pytest.approx(sum(slightly) / len(slightly))
    safety = [win for win, row in zip(wins, PAIRS, strict=True) if row["tag"] == "safety"]
    assert report["by_tag"]["safety"]["value"] == pytest.approx(sum(safety) / len(safety))
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in PAIRS]
    ties = [len(row["chosen"]) == len(row["rejected"]) for row in PAIRS]
    assert report["floors"]["longer"]["value"] == pytest.approx((sum(longer) + sum(ties) / 2) / 40)
    worst = min(scored, key=lambda line: line["margin"])
    assert report["worst"][0]["margin"] == pytest.approx(worst["margin"], abs=1e-5)
    assert report["worst"][0]["chosen"] == PAIRS[worst["row"]]["chosen"].strip()


def test_the_page_needs_no_other_file(models: list[str], tmp_path: Path) -> None:
    evil = PAIRS[:5] + [{**PAIRS[5], "rejected": "<script>alert('x')</script> ``` | a"}]
    out = tmp_path / "out"
    assert evaluate(*models, write(tmp_path / "pairs.jsonl", evil), "--out", out) == 0
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 4 and "<script>" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)
    assert not re.findall(r"url\((?!#)", page)
    text = (out / "report.md").read_text()
    for word in (
        "# Evaluation of model-0, model-1",
        "## Accuracy",
        "floor: always the longer",
        "## Agreement of models",
    ):
        assert word in text


def test_models_are_compared_on_the_same_pairs(models: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate(*models, write(tmp_path / "pairs.jsonl", PAIRS), "--out", out) == 0
    report = report_of(out)
    (agreement,) = report["agreement"]
    of = {name: report["models"][name]["accuracy"]["value"] for name in ("model-0", "model-1")}
    assert agreement["difference"]["value"] == pytest.approx(of["model-0"] - of["model-1"])
    assert (agreement["only_a"] - agreement["only_b"]) / 40 == pytest.approx(of["model-0"] - of["model-1"])
    assert report["accuracy"] == report["models"]["model-0"]["accuracy"]


def test_the_bag_of_words_is_fitted_on_the_pairs_that_are_given(models: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    train = [{"prompt": "q", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    train_file, file = write(tmp_path / "train.jsonl", train), write(tmp_path / "pairs.jsonl", PAIRS)
    assert evaluate(models[0], file, "--out", out, "--train", train_file) == 0
    report = report_of(out)
    assert report["floors"]["bag_of_words"]["value"] == 1.0
    assert report["above_floors"]["bag_of_words"]["value"] == pytest.approx(report["accuracy"]["value"] - 1)


def test_the_metrics_are_in_mlflow(models: list[str], tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri, out = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "my-report"
    assert evaluate(models[0], write(tmp_path / "pairs.jsonl", PAIRS), "--out", out, uri=uri) == 0
    fill_in(out / "tracking", TrackingConfig(uri=uri))  # what a slow machine has not sent within the command's limit
    client = MlflowClient(uri)
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments(filter_string="name = 'rlhf'")])
    report = report_of(out)
    assert run.data.metrics["accuracy"] == pytest.approx(report["accuracy"]["value"])
    assert run.data.metrics["calibration.ece"] == pytest.approx(report["calibration"]["ece"]["value"])
    assert run.info.status == "FINISHED" and run.info.run_name == "my-report"


# --- goes on after a kill


def test_scoring_goes_on_behind_the_last_committed_window(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.evaluate import scorers, scores

    monkeypatch.setattr(scores, "WINDOW", 8)
    file, out = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out"
    assert evaluate(*models, file, "--out", out) == 0
    whole = (out / "scores.jsonl").read_bytes()
    report = (out / "report.json").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join(lines[:22]) + lines[22][:30])  # within the third window
    seen = []
    real = scorers.ModelScorer.score
    monkeypatch.setattr(
        scorers.ModelScorer, "score", lambda self, items: seen.append(items[0].source[-3:]) or real(self, items)
    )
    assert evaluate(*models, file, "--out", out) == 0
    assert (out / "scores.jsonl").read_bytes() == whole
    assert (out / "report.json").read_bytes() == report
    assert len(seen) == 5 - 2 + 5  # windows of the first model that had been committed are not scored again


def test_scores_of_other_data_are_not_mixed(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(models[0], write(tmp_path / "pairs.jsonl", PAIRS), "--out", out) == 0
    before = (out / "scores.jsonl").read_bytes()
    assert evaluate(models[0], write(tmp_path / "pairs.jsonl", PAIRS[:30]), "--out", out) == 2
    assert evaluate(models[1], write(tmp_path / "pairs.jsonl", PAIRS), "--out", out) == 2
    assert "holds scores of other models, data or precision; name another folder" in capsys.readouterr().err
    assert (out / "scores.jsonl").read_bytes() == before


def test_a_file_that_is_no_score_file_is_left_alone(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mine = write(tmp_path / "out" / "scores.jsonl", [{"mine": 1}])
    assert evaluate(models[0], write(tmp_path / "pairs.jsonl", PAIRS), "--out", tmp_path / "out") == 2
    assert Path(mine).read_text() == '{"mine": 1}\n'


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["MODEL"], 2, "no data (a file, a folder of files, or shipped) among"),
        (["DATA"], 2, "no model (a folder, or a name on the hub) among"),
        (["./nowhere", "DATA"], 4, "there is no model folder"),
        (["MODEL", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["MODEL", "MODEL", "DATA"], 2, "a model is named twice"),
        (["POLICY", "DATA"], 4, "is no reward model"),
        (["MODEL", "BAD"], 3, "bad.jsonl:2: "),
        (["MODEL", "EMPTY"], 3, "empty.jsonl"),
        (["MODEL", "DATA", "--train", "EMPTY"], 3, "empty.jsonl"),
    ],
)
def test_what_cannot_be_evaluated_is_told(
    arguments: list[str], code: int, text: str, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(models[0])
    policy = untrained_llama(TinyConfig(hidden_size=32, intermediate_size=64, layers=1, heads=2), tokenizer, seed=0)
    save_causal(policy, tmp_path / "policy", tokenizer)
    words = {
        "MODEL": models[0],
        "DATA": write(tmp_path / "pairs.jsonl", PAIRS),
        "POLICY": str(tmp_path / "policy"),
        "BAD": write(tmp_path / "bad.jsonl", [PAIRS[0], {**PAIRS[1], "chosen": ""}, PAIRS[2]]),
        "EMPTY": write(tmp_path / "empty.jsonl", []),
    }
    assert evaluate(*(words.get(word, word) for word in arguments), "--out", tmp_path / "out") == code
    shown = capsys.readouterr().err
    assert text in shown and "Traceback" not in shown


def test_bad_rows_can_be_left_out(models: list[str], tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [PAIRS[0], {**PAIRS[1], "chosen": ""}, PAIRS[2]])
    assert evaluate(models[0], bad, "--out", tmp_path / "out", "--bad-rows", "skip") == 0
    report = report_of(tmp_path / "out")
    assert report["pairs"] == 2
    assert report["left_out"]["rows"] == 1 and "bad.jsonl:2: " in report["left_out"]["reasons"][0]


def test_a_folder_cannot_be_written_into_a_file(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert evaluate(models[0], write(tmp_path / "pairs.jsonl", PAIRS), "--out", tmp_path / "out") == 2
    assert (tmp_path / "out").read_text() == "mine"


def test_lists_and_benchmarks_are_scored_beside_pairs(models: list[str], tmp_path: Path) -> None:
    best = {"id": "1", "prompt": "q", "chosen": ["yes"], "rejected": ["no", "never", "a b c"], "subset": "Math"}
    judged = {"prompt": "q", "responses": ["one", "two words", "three words here"], "scores": [1, 2, 3]}
    files = [
        write(tmp_path / "best.jsonl", [best, {**best, "prompt": "r"}]),
        write(tmp_path / "lists.jsonl", [judged, {**judged, "prompt": "r"}]),
        write(tmp_path / "pairs.jsonl", [{**row, "subset": "mine"} for row in PAIRS]),
    ]
    assert evaluate(models[0], *files, "--out", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    assert report["pairs"] == 40
    assert report["reward_bench"]["subsets"]["mine"] == report["accuracy"]
    assert report["reward_bench_2"]["subsets"]["Math"]["n"] == 2
    assert report["lists"]["spearman"]["n"] == 2
    assert evaluate(models[0], files[1], "--out", tmp_path / "lists") == 0  # without a pair there is a report too
    assert "Spearman" in (tmp_path / "lists" / "report.md").read_text()


@pytest.mark.integration
def test_a_killed_command_goes_on_where_it_was(models: list[str], tmp_path: Path) -> None:
    """`kill -9` in the middle of scoring; what the second command ends with is what one that was not killed has."""
    rows = [pair(n) for n in range(6000)]
    file, out, whole = write(tmp_path / "pairs.jsonl", rows), tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "launch.cli", "evaluate", "reward", models[0], file, "--tracking-uri", "null"]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (committed := _windows(out)) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "the command ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    assert committed
    with (out / "scores.jsonl").open("a") as stream:
        stream.write('{"model": "half a li')
    assert evaluate(models[0], file, "--out", out) == 0
    assert evaluate(models[0], file, "--out", whole) == 0
    assert (out / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()
    assert report_of(out) == report_of(whole)


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_workers_on_ray_write_what_one_process_writes(models: list[str], tmp_path: Path) -> None:
    """Although one of them, and then the whole command, is killed with `kill -9`."""
    file, out = write(tmp_path / "pairs.jsonl", [pair(n) for n in range(8000)]), tmp_path / "out"
    command = ["evaluate", "reward", models[0], file, "--workers", "2", "--tracking-uri", "null", "--out", str(out)]
    process = rlhf(tmp_path, *command)
    try:
        wait_for(lambda: _windows(out) >= 1, process)
        first, *_ = named(process, "ray::Worker")
        first.kill()
        before = _windows(out)
        wait_for(lambda: _windows(out) >= before + 4, process)  # more than were in flight: the window was given again
    finally:
        process.kill()
        process.wait()
    lines = (out / "scores.jsonl").read_text().splitlines()
    assert _windows(out) < 16, "the command ended before it could be killed"
    again = rlhf(tmp_path, *command)
    assert again.wait(600) == 0, again.communicate()[0]
    assert evaluate(models[0], file, "--out", tmp_path / "one") == 0
    assert (out / "scores.jsonl").read_bytes() == (tmp_path / "one" / "scores.jsonl").read_bytes()
    assert (out / "scores.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert report_of(out) == report_of(tmp_path / "one")


class Busy:
    """Stands for Ray's actors: a call gives a reference, which `get` resolves."""

    def __init__(self, calls: list[int]) -> None:
        self.score = SimpleNamespace(remote=lambda window: calls.append(window) or window)


def test_a_pool_gives_scores_in_order_and_reads_few_windows_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.evaluate import pool

    monkeypatch.setattr(pool, "_result", lambda reference: reference)
    calls: list[list[int]] = [[], [], []]
    scorer = object.__new__(pool.PoolScorer)
    vars(scorer)["_workers"] = [Busy(own) for own in calls]
    read: list[int] = []
    found = scorer.map(read.append(n) or n for n in range(10))  # type: ignore[arg-type]
    assert next(found) == 0 and read == [0, 1, 2, 3, 4, 5]  # two for each worker, however many windows there are
    assert list(found) == list(range(1, 10))  # type: ignore[comparison-overlap]
    assert calls == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize(
    ("nodes", "workers", "each"),
    [
        ([{"CPU": 8}], 3, (2, 0)),
        ([{"CPU": 8}, {"CPU": 4}, {"memory": 1}], 4, (2, 0)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}], 4, (4, 1)),
        ([{"CPU": 2}], 3, "2 CPUs on 1 nodes"),
        ([{"CPU": 8, "GPU": 1}], 2, "1 GPUs on 1 nodes"),
    ],
)
def test_workers_share_the_nodes_of_the_cluster(
    nodes: list[dict], workers: int, each: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from launch.evaluate.pool import share

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    if isinstance(each, tuple):
        assert share(workers) == each
        return
    with pytest.raises(UserError, match=each) as caught:
        share(workers)
    assert caught.value.exit_code == 5


def _windows(out: Path) -> int:
    path = out / "scores.jsonl"
    return path.read_text().count('"window"') if path.exists() else 0


@pytest.mark.integration
def test_many_pairs_need_no_more_memory_than_few(models: list[str], tmp_path: Path) -> None:
    def peak(count: int) -> int:
        """Largest resident memory, in KiB, of an evaluation of so many pairs."""
        file = write(tmp_path / f"{count}.jsonl", [pair(n) for n in range(count)])
        command = ["evaluate", "reward", models[0], file, "--out", str(tmp_path / str(count)), "--tracking-uri", "null"]
        code = f"import resource; from launch import cli; assert cli.main({command}) == 0; print(resource.getrusage(0).ru_maxrss)"
        shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        return int(shown.stdout.splitlines()[-1])

    assert peak(6_000) < 1.05 * peak(1000)
