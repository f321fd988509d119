"""Whole runs as people start them: two workers on Ray, ZeRO-3, MLflow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launch import cli, pipeline, worker_group
from launch.settings import load
from rlhf.ppo.step_profiler import PHASES
from rlhf.tracking import read_metrics
from tests.faults.runs import ROOT, SMOKE, rlhf, wait_for

STAGES = ["sft", "reward/helpfulness", "reward/safety", "ppo"]
SHORT = ["--sft.epochs", "1"]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run: its folder, what it printed, its report, its MLflow runs by name."""
    folder = tmp_path_factory.mktemp("run")
    process = rlhf(folder, "run", str(SMOKE), *SHORT)
    shown, _ = process.communicate(timeout=540)
    assert process.returncode == 0, shown
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "rlhf"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    report = json.loads((folder / "runs/smoke/report.json").read_text())
    return SimpleNamespace(folder=folder / "runs/smoke", shown=shown, report=report, client=client, runs=runs)


# --- folder and terminal --------------------------------------------------------------------------------------------


def test_every_stage_says_that_it_started_and_how_it_ended(finished: Any) -> None:
    for stage in STAGES:
        assert f"{stage}: started" in finished.shown
        assert re.search(rf"^{stage}: done after \d+ s, .*\d", finished.shown, re.MULTILINE)


def test_nothing_of_ray_reaches_the_terminal(finished: Any) -> None:
    assert not re.search(r"\((raylet|pid=|RayTrainWorker)|Traceback|WARNING|\bINFO\b", finished.shown)


def test_every_artifact_loads_without_our_code(finished: Any) -> None:
    for stage in STAGES:
        kind = AutoModelForSequenceClassification if stage.startswith("reward") else AutoModelForCausalLM
        model = kind.from_pretrained(finished.folder / stage / "artifact")
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_every_rank_has_a_log(finished: Any) -> None:
    for stage, ranks in (("sft", 2), ("reward/safety", 1), ("ppo", 2)):
        names = sorted(path.name for path in (finished.folder / stage / "logs").glob("rank-*.log"))
        assert names == [f"rank-{rank}.log" for rank in range(ranks)]


# --- report ---------------------------------------------------------------------------------------------------------


def assert_estimate(value: Any) -> None:
    assert value.keys() >= {"value", "low", "high", "n"}
    assert value["low"] <= value["value"] <= value["high"]
    assert value["n"] > 0


def test_the_report_has_every_figure(finished: Any) -> None:
    report = finished.report
    for name in ("helpfulness", "safety"):
        assert_estimate(report["reward"][name]["accuracy"])
        for estimate in report["reward"][name]["by_rating"].values():
            assert_estimate(estimate)
    for policy in ("base", "sft", "ppo"):
        metrics = report["ppo"]["held_out"][policy]
        for name in ("gold", "length", "eos_rate", "distinct_2"):
            assert_estimate(metrics[name])
        for name in ("helpfulness", "safety"):
            assert_estimate(metrics["reward"][name] if "reward" in metrics else metrics[f"reward.{name}"])
    assert isinstance(report["ppo"]["kl"], float)
    profile = report["ppo"]["profile"]
    assert profile["iterations"] == 2 and 0 < profile["phases"]["update"]["roofline_fraction"] < 1
    assert all(count >= 0 for count in profile["phases"]["sampling"]["tokens"].values())
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert report["seconds"].keys() == report["artifacts"].keys() == set(STAGES)
    assert all((Path(path) / "manifest.json").is_file() for path in report["artifacts"].values())
    assert report["mlflow"]["tracking_uri"].endswith("mlflow.db")
    assert report["mlflow"]["run_id"] == finished.runs["smoke"].info.run_id


def test_the_report_has_text_and_plots(finished: Any) -> None:
    assert "helpfulness" in (finished.folder / "report.md").read_text()
    assert {path.stem for path in (finished.folder / "plots").glob("*.png")} == {"reward_accuracy", "held_out"}


# --- MLflow ---------------------------------------------------------------------------------------------------------


def test_each_stage_is_a_run_inside_the_pipelines(finished: Any) -> None:
    assert finished.runs.keys() == {"smoke", *STAGES}
    parent = finished.runs["smoke"].info.run_id
    for name, run in finished.runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags.get("mlflow.parentRunId") == (None if name == "smoke" else parent)


def test_metrics_stand_under_the_prefix_of_what_they_measure(finished: Any) -> None:
    def prefixes(run: Run) -> set[str]:
        return {name.split("/")[0] for name in run.data.metrics} - {"system"}

    found = {name: prefixes(run) for name, run in finished.runs.items()}
    assert found["sft"] == {"sft", "held_out"}
    assert found["reward/helpfulness"] == found["reward/safety"] == {"reward", "held_out"}
    assert found["ppo"] == {"ppo", "eval", "perf", "held_out"}
    assert found["smoke"] == {"eval", "ppo"}


def test_every_metric_has_its_definition(finished: Any) -> None:
    defined = set(re.findall(r"`([a-z]+/[\w<>]+)`", (ROOT / "docs/metrics.md").read_text()))
    told = {name for stage in STAGES for name in read_metrics(finished.folder / stage)}
    assert {in_general(name) for name in told} <= defined


def in_general(name: str) -> str:
    """perf/tokens_update_padded → perf/tokens_<phase>_<kind>, eval/reward_safety → eval/reward_<name>."""
    name = re.sub("(?<=/flagged_)(helpful|safety)$", "<tag>", name)
    name = re.sub("(?<=/reward_)(helpfulness|safety)$", "<name>", name)
    name = re.sub(rf"(?<=_)({'|'.join(PHASES)})(?=_|$)", "<phase>", name)
    return re.sub(r"(?<=tokens_<phase>_)\w+", "<kind>", name)


def test_a_run_names_settings_data_code_and_the_artifacts_that_it_used(finished: Any) -> None:
    ppo, manifest = finished.runs["ppo"], json.loads((finished.folder / "ppo/artifact/manifest.json").read_text())
    assert ppo.data.params["ppo.optim.lr"] == "0.001"
    assert ppo.data.tags["artifact.digest"] == manifest["digest"]
    assert "git.revision" in ppo.data.tags
    for name in ("sft", "reward/helpfulness", "reward/safety"):
        used = json.loads((finished.folder / name / "artifact/manifest.json").read_text())["digest"]
        assert ppo.data.tags[f"input.{name}"].endswith(used)
        assert manifest["parents"][name] == used
    for name, roles in (("sft", {"demonstrations", "evaluation"}), ("ppo", {"prompts", "evaluation"})):
        inputs = finished.runs[name].inputs.dataset_inputs
        assert {tag.value for i in inputs for tag in i.tags if tag.key == "mlflow.data.context"} == roles
        assert all(i.dataset.digest for i in inputs)


def test_the_run_of_the_pipeline_tells_what_it_was_made_from(finished: Any) -> None:
    run, report = finished.runs["smoke"], finished.report
    assert (run.data.params["ppo.kl_coef"], run.data.params["model.tiny.layers"]) == ("0.01", "2")
    inputs = run.inputs.dataset_inputs
    roles = {tag.value for entry in inputs for tag in entry.tags if tag.key == "mlflow.data.context"}
    assert roles == {"demonstrations", "preferences", "prompts"}
    assert "| ppo |" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["eval/accuracy_safety"] == report["reward"]["safety"]["accuracy"]["value"]
    curve = finished.client.get_metric_history(run.info.run_id, "ppo/reward")
    assert [(point.step, point.value) for point in curve] == read_metrics(finished.folder / "ppo")["ppo/reward"]


def test_every_artifact_is_a_model_with_its_metrics_on_held_out_data(finished: Any) -> None:
    experiment = finished.runs["smoke"].info.experiment_id
    models = {model.name: model for model in finished.client.search_logged_models([experiment])}
    assert models.keys() == {f"smoke-{stage.replace('/', '-')}" for stage in STAGES}
    assert {name for name, model in models.items() if model.model_type == "policy"} == {"smoke-sft", "smoke-ppo"}
    safety = {metric.key: metric for metric in models["smoke-reward-safety"].metrics}
    assert safety["held_out/accuracy"].value == finished.report["reward"]["safety"]["accuracy"]["value"]
    assert safety["held_out/accuracy"].dataset_name == "preferences, held out"
    ppo = {metric.key: metric.value for metric in models["smoke-ppo"].metrics}
    held_out = finished.report["ppo"]["held_out"]["ppo"]
    assert ppo["held_out/reward_safety"] == held_out["reward"]["safety"]["value"]
    sft = {metric.key: metric.value for metric in models["smoke-sft"].metrics}
    assert sft["held_out/reward_safety"] == finished.report["ppo"]["held_out"]["sft"]["reward"]["safety"]["value"]
    assert models["smoke-ppo"].tags["artifact.path"] == str(finished.folder / "ppo/artifact")


def test_the_policy_is_registered_with_the_versions_that_it_started_from(finished: Any) -> None:
    version = finished.client.get_model_version_by_alias("rlhf-policy", "candidate")
    assert version.source == str(finished.folder / "ppo/artifact")
    assert version.tags["input.sft"].startswith("models:/rlhf-sft/1 ")
    assert version.tags["input.reward/safety"].startswith("models:/rlhf-reward-safety/1 ")
    prompts = {key for key in version.tags if key.startswith("data.prompts: shipped")}
    assert prompts == {"data.prompts: shipped", "data.prompts: shipped:held_out"}


def test_settings_samples_and_the_report_are_kept_with_the_run(finished: Any) -> None:
    def files(name: str) -> set[str]:
        return {entry.path for entry in finished.client.list_artifacts(finished.runs[name].info.run_id)}

    assert {"config.yaml", "samples.json", "held_out_answers.json"} <= files("ppo")
    assert {"report.json", "report.md", "held_out.png"} <= files("smoke")


def test_a_second_run_finds_all_stages_complete(
    finished: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(worker_group, "cluster", fail)
    monkeypatch.chdir(finished.folder.parents[1])
    assert cli.main(["run", str(SMOKE), *SHORT]) == 0
    shown = capsys.readouterr().out
    assert all(f"{stage}: complete, with these settings and this data; skipped" in shown for stage in STAGES)
    assert json.loads((finished.folder / "report.json").read_text()) == finished.report


# --- layout ---------------------------------------------------------------------------------------------------------


def test_one_process_makes_what_two_ranks_under_zero_3_made(finished: Any, tmp_path: Path) -> None:
    config = load(SMOKE, [*SHORT, "--runs_dir", str(tmp_path), "--tracking.uri", "null", "--hardware.workers", "1"])
    for stage in ("sft", "reward", "ppo"):
        pipeline.run_stage(config, stage, True, None)
    for stage in ("sft", "reward/helpfulness", "reward/safety"):
        ours = load_file(tmp_path / "smoke" / stage / "artifact/model.safetensors")
        theirs = load_file(finished.folder / stage / "artifact/model.safetensors")
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, atol=2e-4, rtol=0, msg=lambda t, n=name: f"{n}: {t}")
    alone, together = (read_metrics(folder / "ppo") for folder in (tmp_path / "smoke", finished.folder))
    for name in ("ppo/length", "ppo/eos_rate", "ppo/reward", "ppo/policy_loss", "ppo/value_loss", "ppo/kl", "eval/kl"):
        assert together[name] == [(step, pytest.approx(value, abs=2e-3)) for step, value in alone[name]], name


def test_torchrun_makes_what_the_gang_made(finished: Any, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch.cli"]
    settings = ["--runs_dir", str(tmp_path), "--tracking.uri", "null"]
    done = subprocess.run(
        [*launcher, "stage", "sft", str(SMOKE), *SHORT, *settings],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        load_file(folder / "sft/artifact/model.safetensors") for folder in (tmp_path / "smoke", finished.folder)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


# --- interrupted ----------------------------------------------------------------------------------------------------


UNPACKED = ["--tracking.uri", "null", "--sft.packing", "false"]  # 32 steps an epoch


def test_ctrl_c_stops_every_process(tmp_path: Path) -> None:
    process = rlhf(tmp_path, "stage", "sft", str(SMOKE), *UNPACKED, "--sft.epochs", "99", "--hardware.workers", "1")
    folder = tmp_path / "runs/smoke/sft"
    wait_for(lambda: (folder / "progress.json").exists(), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown and "error: sft: stopped by SIGINT after step" in shown
    _, alive = psutil.wait_procs(children, timeout=30)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    assert not (folder / "artifact/manifest.json").exists()
