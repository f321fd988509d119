"""The pipeline: what runs again and what does not (with stages that only seal something), and what checkpoints outlive."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import pipeline, stage_folder, worker_group
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import artifacts, provenance
from rlhf.runs.context import StageContext
from stages import base
from stages.base import Stage
from tests.launch.fake_worker_group import STAGES, FakeWorkerGroup, few_shipped_rows, no_cluster
from tests.rlhf.chat.templates import tokenizer_with

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were started, in order; without Ray, and without a report."""
    started: list[str] = []
    monkeypatch.setattr(FakeWorkerGroup, "started", started, raising=False)
    monkeypatch.setattr(FakeWorkerGroup, "meets", {}, raising=False)
    monkeypatch.setattr(worker_group, "cluster", no_cluster)
    monkeypatch.setattr(worker_group, "WorkerGroup", FakeWorkerGroup)
    monkeypatch.setattr(worker_group, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    monkeypatch.setattr(pipeline, "_report", lambda *_: None)
    return started


@pytest.fixture(scope="module", autouse=True)
def few_rows(tmp_path_factory: pytest.TempPathFactory):
    with few_shipped_rows(tmp_path_factory.mktemp("shipped")):
        yield


def settings(runs_dir: Path, *overrides: str) -> RunConfig:
    own = ["--runs_dir", str(runs_dir), "--tracking.uri", "null", "--hardware.workers", "1"]
    return load(ROOT / "tests/smoke.yaml", [*own, *overrides])


@pytest.fixture
def again(started: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    """again(*overrides) runs a finished run once more → the stages that were started."""

    def run(*overrides: str, fresh: bool = False) -> list[str]:
        started.clear()
        assert pipeline.run(settings(tmp_path, *overrides), fresh) == 0
        return list(started)

    assert run() == STAGES
    return run


def test_a_complete_run_starts_not_even_a_cluster(
    again: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: RunConfig) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(worker_group, "cluster", fail)
    assert again() == []
    shown = capsys.readouterr().out
    assert all(f"{stage}: complete" in shown for stage in STAGES)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("--ppo.kl_coef", "0.02"), ["ppo"]),
        (("--reward.models.safety.safety_loss_weight", "0.4"), ["reward/safety", "ppo"]),
        (("--data.prompts.train.0.limit", "60"), ["ppo"]),
        (("--hardware.max_restarts", "0", "--tracking.experiment", "other"), []),
    ],
)
def test_a_changed_setting_runs_what_depends_on_it(
    again: Callable[..., list[str]], change: tuple[str, ...], expected: list[str]
) -> None:
    assert again(*change) == expected
    assert again(*change) == []


def test_a_finished_stage_that_is_made_again_is_set_aside_and_what_changed_is_said(
    again: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def content(folder: Path) -> str:
        return (folder / "artifact/model.safetensors").read_text()

    first = content(tmp_path / "smoke/ppo")
    assert again("--ppo.kl_coef", "0.02") == ["ppo"]
    second = content(tmp_path / "smoke/ppo")
    assert f"(settings); the finished one is set aside in {tmp_path / 'smoke/earlier'}" in capsys.readouterr().out
    assert again("--reward.models.safety.safety_loss_weight", "0.4", "--ppo.kl_coef", "0.02") == [
        "reward/safety",
        "ppo",
    ]
    assert "ppo: made from other things than today (reward/safety); the finished" in capsys.readouterr().out
    kept = sorted((tmp_path / "smoke/earlier").glob("*/ppo"), key=lambda path: int(path.parent.name))
    assert [content(path) for path in kept] == [first, second]


def test_another_code_revision_is_said_and_makes_nothing_stale(
    again: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = artifacts.code_revision()
    assert again() == [] and "code revision" not in capsys.readouterr().out
    monkeypatch.setattr("launch.aside.code_revision", lambda: "abc")
    assert again() == []
    assert capsys.readouterr().out.count(f"was made by code revision {before}, which is abc now") == 4


@pytest.mark.parametrize(("cpus", "at_once"), [(2.0, 2), (1.0, 1)])
def test_reward_models_that_do_not_fit_side_by_side_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: float, at_once: int
) -> None:
    running, most = [0], [0]

    class Counted(FakeWorkerGroup):
        def __init__(self, config: RunConfig, stage: str, workers: int) -> None:
            super().__init__(config, stage, workers)
            running[0] += 1
            most[0] = max(most[0], running[0])

        def result(self) -> None:
            running[0] -= 1

    monkeypatch.setattr(worker_group, "WorkerGroup", Counted)
    monkeypatch.setattr(worker_group, "cluster_resources", lambda: {"CPU": cpus, "GPU": 0.0})
    assert pipeline.run(settings(tmp_path), False) == 0
    assert most == [at_once]
    status = json.loads((tmp_path / "smoke/status.json").read_text())
    assert {name: stage["state"] for name, stage in status["stages"].items()} == dict.fromkeys(STAGES, "done")
    assert status["ended"] == {"status": "FINISHED", "reason": ""}


def test_other_content_of_a_data_file_runs_what_reads_it(again: Callable[..., list[str]], tmp_path: Path) -> None:
    shipped = (ROOT / "reward_data/shipped/prompts.train.jsonl").read_text().splitlines(keepends=True)
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(shipped[:40]))
    own = ("--data.prompts.train", f"[{{path: {rows}}}]")
    assert again(*own) == ["ppo"]
    rows.write_text("".join(shipped[:41]))
    assert again(*own) == ["ppo"]
    assert again(*own) == []


def test_a_run_that_was_killed_between_stages_goes_on_where_it_was(
    again: Callable[..., list[str]], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "smoke/ppo")
    assert again() == ["ppo"]


def test_an_artifact_without_its_manifest_is_made_again(again: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "smoke/reward/safety/artifact/manifest.json").unlink()
    assert again()[0] == "reward/safety"


def test_a_damaged_artifact_is_named_and_nothing_starts(
    again: Callable[..., list[str]], started: list[str], tmp_path: Path
) -> None:
    weights = tmp_path / "smoke/sft/artifact/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged: model.safetensors has .* Remove") as caught:
        again()
    assert caught.value.exit_code == 4
    assert started == []


def test_fresh_starts_over(again: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "smoke/leftover").write_text("")
    assert again(fresh=True) == STAGES
    assert not (tmp_path / "smoke/leftover").exists()


def test_a_stage_that_fails_says_why_and_those_before_it_stay(
    again: Callable[..., list[str]], started: list[str], tmp_path: Path
) -> None:
    FakeWorkerGroup.meets["reward/safety"] = UserError("rank 0 on here was killed (signal 9)", 6)
    with pytest.raises(UserError, match="reward/safety failed: rank 0 on here was killed") as end:
        again("--reward.models.safety.safety_loss_weight", "0.4")
    assert end.value.exit_code == 6
    ended = json.loads((tmp_path / "smoke/status.json").read_text())["ended"]
    assert ended == {"status": "FAILED", "reason": end.value.message}
    assert started == ["reward/safety"]
    FakeWorkerGroup.meets.clear()
    assert again("--reward.models.safety.safety_loss_weight", "0.4") == ["reward/safety", "ppo"]


@pytest.fixture
def checkpointed(again: Callable[..., list[str]], tmp_path: Path) -> Path:
    """The checkpoint folder of a PPO stage that was broken off."""
    FakeWorkerGroup.meets["ppo"] = UserError("killed", 6)
    with pytest.raises(UserError, match="ppo failed"):
        again("--ppo.kl_coef", "0.02")
    FakeWorkerGroup.meets.clear()
    folder = tmp_path / "smoke/ppo/checkpoints"
    folder.mkdir()
    (folder / "iteration-000001").mkdir()
    return folder


def prepare(config: RunConfig) -> None:
    stage_folder.prepare(config, "ppo", provenance.stage_data(config, ["prompts"]))


def test_checkpoints_stay_for_the_same_settings(checkpointed: Path, tmp_path: Path) -> None:
    prepare(settings(tmp_path, "--ppo.kl_coef", "0.02"))
    assert checkpointed.exists()


@pytest.mark.parametrize(
    "change", [("--ppo.kl_coef", "0.03"), ("--ppo.kl_coef", "0.02", "--reward.models.safety.safety_loss_weight", "0.4")]
)
def test_checkpoints_go_when_settings_or_parents_are_others(
    checkpointed: Path, again: Callable[..., list[str]], tmp_path: Path, change: tuple[str, ...]
) -> None:
    """Else PPO would go on with a policy of another start."""
    FakeWorkerGroup.meets["ppo"] = UserError("killed", 6)
    with pytest.raises(UserError, match="ppo failed"):
        again(*change)
    assert not checkpointed.exists()


@pytest.mark.parametrize("change", [("--hardware.workers", "2"), ("--hardware.zero_stage", "2")])
def test_checkpoints_stay_for_another_layout(checkpointed: Path, tmp_path: Path, change: tuple[str, ...]) -> None:
    prepare(settings(tmp_path, "--ppo.kl_coef", "0.02", *change))
    assert checkpointed.exists()


def test_an_input_that_was_edited_since_is_refused(again: Callable[..., list[str]], tmp_path: Path) -> None:
    config = settings(tmp_path)
    file = next(path for path in (config.folder / "sft/artifact").iterdir() if path.name != "manifest.json")
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    (config.folder / "reward/safety/artifact/manifest.json").unlink()
    with pytest.raises(UserError, match=f"{file.name} has other content than when it was committed") as caught:
        pipeline.run_stage(config, "reward", True, "safety")
    assert caught.value.exit_code == 4


def test_a_stage_alone_needs_those_before_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ppo starts from sft, which is not complete .* Run it first") as caught:
        pipeline.run_stage(settings(tmp_path), "ppo", True, None)
    assert caught.value.exit_code == 4


def test_the_pipeline_says_what_runs_and_a_longer_one_keeps_what_is_complete(
    started: list[str], tmp_path: Path
) -> None:
    def run(pipeline_: str) -> list[str]:
        started.clear()
        assert pipeline.run(settings(tmp_path, "--pipeline", pipeline_), False) == 0
        return list(started)

    assert run("[sft]") == ["sft"]
    assert run("[sft, reward]") == ["reward/helpfulness", "reward/safety"]
    assert run("[sft, reward, ppo]") == ["ppo"]


def test_a_stage_that_the_pipeline_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this run has no reward/helpfulness, reward/safety; its pipeline makes sft$"):
        pipeline.run_stage(settings(tmp_path, "--pipeline", "[sft]"), "reward", True, None)


def test_a_new_stage_is_a_module_and_a_line_of_the_registry(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is run in its turn, is given what it asks for, and is not done again until a setting or a parent changes."""

    def main(config: RunConfig, context: StageContext) -> artifacts.Artifact:
        data = provenance.stage_data(config, context.roles)
        assert (list(data), list(context.inputs)) == (["preferences"], ["sft"])

        def write(folder: Path) -> None:
            (folder / "count").write_text(str(len(data["preferences"].train)))

        return provenance.commit(config, context, provenance.parents(data, context.inputs), {}, write=write)

    monkeypatch.setitem(sys.modules, "stages.tune", SimpleNamespace(main=main))
    monkeypatch.setitem(base.STAGES, "tune", Stage("tune", ("preferences",), inputs=lambda config: ["sft"]))
    config = settings(tmp_path, "--pipeline", "[sft, tune]")
    pipeline.run(settings(tmp_path, "--pipeline", "[sft]"), False)
    pipeline.run_stage(config, "tune", True, None)
    made = artifacts.load(tmp_path / "smoke/tune/artifact")
    assert made.parents.keys() == {"sft", "preferences: shipped", "preferences: shipped:held_out"}
    started.clear()
    pipeline.run(config, False)
    assert started == []
    pipeline.run(settings(tmp_path, "--pipeline", "[sft, tune]", "--sft.epochs", "5"), False)
    assert started == ["sft", "tune"]


def test_the_template_that_auto_keeps_is_said_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer_with("chatml").save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    config = load("quickstart", ["--model.path", str(tmp_path / "model")])
    pipeline.checked_data(config, ["sft"])
    assert capsys.readouterr().out.count("chat format: the template that the tokenizer of") == 1
    pipeline.checked_data(load("quickstart", []), ["sft"])
    assert "chat format" not in capsys.readouterr().out
