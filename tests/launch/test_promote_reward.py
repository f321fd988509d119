"""`rlhf promote` for reward models, and what any comparison leaves out because a model has trained on it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli
from launch.evaluate import reward as evaluate_reward
from launch.evaluate.scorers import Scored
from launch.logged_model import describe
from launch.promote.trained_on import leave_out
from launch.settings import load
from reward_data import Message, Preference, Prompt
from rlhf.config import RunConfig, public
from rlhf.data import Split, parsed
from rlhf.errors import UserError
from rlhf.evaluation.items import Item
from rlhf.runs import artifacts
from rlhf.tracking import Version, fill_in, open_tracker

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
WRONG = {"plain": 5, "bad": 3, "better": 11}  # every so many pairs are ranked wrongly
EXTRA = range(60, 70)  # prompts that the run `better` trained on


def pairs(numbers: Iterable[int]) -> list[Preference]:
    return [
        Preference(
            (Message("user", f"question {n}"),),
            f"good {n}",
            f"bad {n} and long",
            "better",
            ("helpful", "safety")[n % 4 == 0],
            "safe",
            "safe",
            f"p.jsonl:{n}",
        )
        for n in numbers
    ]


class FakeScorer:
    """Its folder says which pairs it ranks wrongly."""

    def __init__(self, folder: Path, batch_size: int, precision: str) -> None:
        self._wrong = int((folder / "rule.txt").read_text())

    def check(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"format": "none", "begins": [], "ends": 1.0, "padding": 0.0, "warnings": []}

    def map(self, windows: Iterable[Sequence[Item]]) -> Iterator[Scored]:
        for items in windows:
            scores = {}
            for n, item in enumerate(items):
                number = int(item.prompt[-1].content.split()[-1])
                gap = math.log(self._wrong - 1)  # as sure as it is right
                scores[n] = [0.0, gap] if number % self._wrong == 0 else [gap, 0.0]
            yield Scored(scores, [])


def config_of(folder: Path, name: str) -> RunConfig:
    values = {"name": name, "runs_dir": str(folder / "runs"), "tracking.uri": f"sqlite:///{folder}/mlflow.db"}
    return load(SMOKE, [word for key, value in values.items() for word in (f"--{key}", value)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("promote")
    for name, wrong in WRONG.items():
        config = config_of(root, name)
        stage = config.folder / "reward/helpfulness"
        train = pairs([*range(1000, 1010), *(EXTRA if name == "better" else ())])
        parsed.write(config, {"preferences": Split(train, pairs(range(400)), {"mine": f"d-{name}"}, [])})
        (artifacts.begin(stage / "artifact") / "rule.txt").write_text(str(wrong))
        (stage / "config.yaml").write_text(yaml.safe_dump(public(config), sort_keys=False))
        parents = {"sft": "d", "preferences: mine": f"d-{name}"}
        artifact = artifacts.complete(stage / "artifact", "reward/helpfulness", parents, "settings", {})
        tracker = open_tracker(stage, config.tracking, "reward/helpfulness", None, is_writer=True)
        tracker.model(describe(config, artifact))
        tracker.close()
        assert fill_in(stage, config.tracking)
    return root


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_worse_reward_model_is_refused_and_a_better_one_promoted_until_it_is_taken_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(evaluate_reward, "ModelScorer", FakeScorer)
    client, runs = MlflowClient(f"sqlite:///{folder}/mlflow.db"), folder / "runs"

    def promote(*arguments: object) -> tuple[int, str]:
        code = cli.main(["promote", *map(str, arguments), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"])
        return code, "".join(capfd.readouterr())

    def champion() -> str | None:
        version = client.get_registered_model("rlhf-reward-helpfulness").aliases.get("champion")
        return version and client.get_model_version("rlhf-reward-helpfulness", version).tags["run"]

    assert promote(runs / "plain/reward/helpfulness")[0] == 0 and champion() == "plain"
    code, shown = promote(runs / "bad/reward/helpfulness")
    assert code == 7 and "400 pairs" in shown and "Not promoted: accuracy, " in shown and champion() == "plain"
    gate = json.loads((runs / "bad/reward/helpfulness/promotion/gate.json").read_text())
    helpful = [n for n in range(400) if n % 4]
    worse = sum((n % 3 != 0) - (n % 5 != 0) for n in helpful) / len(helpful)
    assert gate["checks"]["accuracy"]["value"]["value"] == pytest.approx(worse)
    assert gate["checks"]["accuracy"]["value"]["n"] == 300 and gate["notes"] == []

    code, shown = promote("models:/rlhf-reward-helpfulness/3")
    assert code == 0 and champion() == "better"
    assert "10 of 400 rows left out: models:/rlhf-reward-helpfulness/3 trained on their prompts" in shown
    assert "390 pairs" in shown
    written = (runs / "better/reward/helpfulness/promotion/pairs.jsonl").read_text().splitlines()
    numbers = {int(json.loads(line)["prompt"][0]["content"].split()[-1]) for line in written}
    assert numbers == set(range(400)) - set(EXTRA)
    assert promote("--undo", "models:/rlhf-reward-helpfulness")[0] == 0 and champion() == "plain"

    code, shown = promote(runs / "bad/reward/helpfulness", "--prompts", "shipped")
    assert code == 2 and "--pairs FILE" in shown
    own = folder / "own.jsonl"
    own.write_text("".join(json.dumps(asdict(row)) + "\n" for row in pairs(range(1000, 1040))))
    code, shown = promote(runs / "bad/reward/helpfulness", "--pairs", own)
    assert code == 7 and "30 pairs" in shown


def version(config: RunConfig, kind: str = "reward/helpfulness") -> Version:
    return Version("m", 1, {"artifact.path": str(config.folder / kind / "artifact"), "artifact.kind": kind})


def prompts(numbers: Iterable[int]) -> list[Prompt]:
    return [Prompt((Message("user", f"Question  {n}"),), "helpful", f"q:{n}") for n in numbers]


def test_what_either_has_trained_on_is_left_out(folder: Path) -> None:
    """Prompts are the same if they differ only in case and white space."""
    plain, better = (version(config_of(folder, name)) for name in ("plain", "better"))
    kept, notes = leave_out(prompts([*range(50, 100), 1001, 1002]), (plain, better), {})
    assert [row.source for row in kept] == [f"q:{n}" for n in (*range(50, 60), *range(70, 100))]
    assert [note.split(":")[0] for note in notes] == ["2 of 52 rows left out", "12 of 52 rows left out"]
    with pytest.raises(UserError, match="only 29 of 39 prompts remain") as error:
        leave_out(prompts(range(60, 99)), (plain, better), {})
    assert error.value.exit_code == 3
    few, notes = leave_out(prompts(range(5)), (plain, better), {})
    assert len(few) == 5 and notes == []


def test_where_the_data_was_replaced_files_are_told_by_their_digests(tmp_path: Path) -> None:
    config = config_of(tmp_path, "one")
    stage = config.folder / "reward/helpfulness"
    (artifacts.begin(stage / "artifact") / "rule.txt").write_text("5")
    (stage / "config.yaml").write_text(yaml.safe_dump(public(config), sort_keys=False))
    artifacts.complete(stage / "artifact", "reward/helpfulness", {"preferences: mine": "old"}, "settings", {})
    parsed.write(config, {"preferences": Split(pairs(range(9)), [], {"mine": "new"}, [])})
    kept, notes = leave_out(prompts(range(40)), (version(config),), {"file": "other"})
    assert len(kept) == 40 and "is gone or was replaced" in notes[0]
    with pytest.raises(UserError, match="file: models:/m/1 has trained on this file"):
        leave_out(prompts(range(40)), (version(config),), {"file": "old"})


def test_prompts_that_chose_the_other_policy_are_left_out_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, "one").model_copy(update={"pipeline": ["sft", "ppo"]})
    stage, count = config.folder / "ppo", config.ppo.eval_prompts
    rows = [Prompt((Message("user", f"question {n}"),), "helpful", f"q:{n}") for n in range(count + 40)]
    parsed.write(config, {"prompts": Split([], rows, {}, [])})
    (artifacts.begin(stage / "artifact") / "rule.txt").write_text("5")
    (stage / "config.yaml").write_text(yaml.safe_dump(public(config), sort_keys=False))
    artifacts.complete(stage / "artifact", "ppo", {"sft": "d"}, "settings", {})
    kept, notes = leave_out(rows, (version(config, "ppo"),), {})
    assert len(kept) == 40 and f"{count} of {count + 40} rows left out" in notes[0]
