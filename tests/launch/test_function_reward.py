"""A run as people start it who bring a reward of their own: GRPO with a function of a file, on real Ray, two ranks.

No reward model and no critic is in it: neither trained nor loaded, saved or shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from rlhf.tracking import read_metrics

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests/smoke.yaml"
UNSCORED = 3  # of the column `wanted`

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

MINE = f"""
def as_long_as_wanted(responses, wanted):
    pairs = zip(responses, wanted, strict=True)
    return [None if number == {UNSCORED} else -abs(len(text) - 10.0 * number) / 10 for text, number in pairs]
"""


def rows(count: int, start: int) -> str:
    """Prompts with a column of their own; one in eight has a number that gets no score."""
    numbers = range(start, start + count)
    return "".join(
        json.dumps({"prompt": f"Write some words about number {i}.", "wanted": i % 8}) + "\n" for i in numbers
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    (folder / "mine.py").write_text(MINE)
    for name, count, start in (("train", 64, 0), ("held_out", 32, 64)):
        (folder / f"{name}.jsonl").write_text(rows(count, start))
    settings = {
        "pipeline": "[sft, ppo]",
        "sft.epochs": "1",
        "data.gold": "none",
        "data.prompts": f"{{train: [{{path: {folder}/train.jsonl}}], held_out: [{{path: {folder}/held_out.jsonl}}]}}",
        "ppo.advantage": "grpo",
        "ppo.group_size": "4",
        "ppo.rewards": "{length: {function: mine.py:as_long_as_wanted}}",
    }
    command = [sys.executable, "-m", "launch.cli", "run", str(SMOKE)]
    done = subprocess.run(
        [*command, *(word for name, value in settings.items() for word in (f"--{name}", value))],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    run = folder / "runs/smoke"
    return SimpleNamespace(folder=run, uri=f"sqlite:///{folder}/mlflow.db", metrics=read_metrics(run / "ppo"))


def test_the_function_is_what_training_maximises(finished: Any) -> None:
    told = {name: dict(points) for name, points in finished.metrics.items()}
    for step in (1, 2):
        assert told["ppo/reward"][step] == told["ppo/reward_length"][step] < 0
        assert 0 <= told["ppo/reward_failed_fraction"][step] < 0.5
        assert told["ppo/grad_norm"][step] > 0
    assert [step for step, _ in finished.metrics["eval/reward"]] == [0, 1, 2]


def test_the_samples_show_the_score_that_the_function_gives(finished: Any) -> None:
    """Each of its row's own column."""
    scope: dict[str, Any] = {}
    exec(MINE, scope)  # noqa: S102  our own text above
    events = [json.loads(line) for line in (finished.folder / "ppo/events.jsonl").read_text().splitlines()]
    table = [row for event in events if event.get("name") == "samples" for row in event["rows"]]
    assert len(table) == 2 * 8
    for row in table:
        number = int(row["prompt"].partition("number ")[2].partition(".")[0])
        (expected,) = scope["as_long_as_wanted"]([row["answer"]], [number % 8])
        assert row["length"] == (None if expected is None else pytest.approx(expected))


def test_the_failed_fraction_is_that_of_prompts_without_a_score(finished: Any) -> None:
    fractions = [value for _, value in finished.metrics["ppo/reward_failed_fraction"]]
    assert all(value in (0.0, 0.25, 0.5) for value in fractions)  # four prompts an iteration, failing as a whole


def test_no_reward_model_and_no_critic_is_anywhere(finished: Any) -> None:
    assert {path.name for path in finished.folder.iterdir()} >= {"sft", "ppo", "report.json"}
    assert not (finished.folder / "reward").exists()
    assert [path for path in finished.folder.rglob("*") if "critic" in path.name] == []
    parents = json.loads((finished.folder / "ppo/artifact/manifest.json").read_text())["parents"]
    assert {name.partition(":")[0] for name in parents} == {"sft", "prompts"}
    about_a_critic = ("critic", "value", "explained_variance")
    assert not [name for name in finished.metrics if any(word in name for word in about_a_critic)]
    client = MlflowClient(finished.uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.run_name for run in runs} == {"smoke", "sft", "ppo"}
    assert not [name for run in runs for name in run.data.metrics if any(word in name for word in about_a_critic)]


def test_the_report_shows_the_reward_and_no_critic(finished: Any) -> None:
    report = json.loads((finished.folder / "report.json").read_text())
    for policy in ("sft", "ppo"):
        assert report["ppo"]["held_out"][policy]["reward"]["length"]["n"] > 0
    text = (finished.folder / "report.md").read_text() + json.dumps(report)
    assert "reward" in text and "critic" not in text and "value_loss" not in text
