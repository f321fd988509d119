"""`pipeline: [sft, dpo]` as people start it: two workers on Ray under ZeRO-3, MLflow, the report; and under torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from launch import pipeline
from launch.chat import chat
from launch.settings import load
from launch.stage_folder import complete_artifact
from rlhf.config import RunConfig
from rlhf.tracking import read_metrics

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests/smoke.yaml"
OWN = ["--pipeline", "[sft, dpo]", "--sft.epochs", "1", "--dpo.optim.lr", "1e-3"]
OWN += ["--dpo", "{epochs: 1, batch_size: 32, micro_batch_size: 8, max_length: 256, evals: 1, checkpoints: 1}"]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """One run of SFT and DPO."""
    folder = tmp_path_factory.mktemp("run")
    done = command(folder, "launch.cli", "run", str(SMOKE), *OWN)
    assert done.returncode == 0, done.stdout + done.stderr
    config = load(SMOKE, [*OWN, "--runs_dir", str(folder / "runs"), "--tracking.uri", f"sqlite:///{folder}/mlflow.db"])
    assert re.search(r"^dpo: done after \d+ s, accuracy .* held out accuracy", done.stdout, re.MULTILINE)
    return config


def test_report_and_mlflow_have_the_figures_of_both_stages_and_no_other(run: RunConfig) -> None:
    report = json.loads((run.folder / "report.json").read_text())
    assert list(report) == ["run", "sft", "dpo", "seconds", "artifacts", "mlflow"]
    text = (run.folder / "report.md").read_text()
    accuracy = report["dpo"]["accuracy"]
    assert "## DPO: held-out metrics" in text and f"| accuracy | {accuracy['value']:.2f} [" in text
    assert "PPO" not in text and accuracy["n"] == 32

    client = MlflowClient(run.tracking.uri)
    runs = {one.info.run_name: one for one in client.search_runs(["1"])}
    assert runs.keys() == {"smoke", "sft", "dpo"}
    assert runs["smoke"].data.metrics["eval/dpo/accuracy"] == pytest.approx(accuracy["value"])
    assert runs["dpo"].data.params["dpo.beta"] == "0.1" and "dpo/held_out_loss" in runs["dpo"].data.metrics


def test_the_artifact_talks(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.folder / "dpo/artifact")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    chat(str(run.folder / "dpo"), 0.0, 4, StringIO("say hello.\n"))
    assert "error" not in capsys.readouterr().err


def test_it_is_complete_until_a_setting_of_its_own_changes(run: RunConfig) -> None:
    data = pipeline.checked_data(run, ["sft", "dpo"])
    assert complete_artifact(pipeline.absolute(run), "dpo", data) is not None
    changed = run.model_copy(update={"dpo": run.dpo.model_copy(update={"beta": 0.2})})
    assert complete_artifact(pipeline.absolute(changed), "sft", data) is not None
    assert complete_artifact(pipeline.absolute(changed), "dpo", data) is None


def beside(run: RunConfig, folder: Path) -> list[str]:
    """Settings of another run that has the same SFT model."""
    (folder / "smoke").mkdir()
    for made in ("base", "sft"):
        (folder / "smoke" / made).symlink_to(run.folder / made)
    return [*OWN, "--runs_dir", str(folder), "--tracking.uri", "null"]


def test_one_process_makes_the_same_steps_as_two_ranks(run: RunConfig, tmp_path: Path) -> None:
    """The loss of a step is the mean over all its pairs, wherever they are read."""
    settings = load(SMOKE, [*beside(run, tmp_path), "--hardware.workers", "1"])
    pipeline.run_stage(settings, "dpo", True, None)
    alone, together = (read_metrics(config.folder / "dpo") for config in (settings, run))
    for name in ("dpo/loss", "dpo/margin", "dpo/logprob_chosen", "dpo/grad_norm", "dpo/held_out_loss"):
        ours, theirs = ([value for _, value in series[name]] for series in (alone, together))
        assert len(ours) == (1 if "held_out" in name else 4)
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4), name


def test_torchrun_makes_them_too(run: RunConfig, tmp_path: Path) -> None:
    settings = beside(run, tmp_path)
    ranks = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "launch.cli"]
    done = command(tmp_path, *ranks, "stage", "dpo", str(SMOKE), *settings)
    assert done.returncode == 0, done.stderr
    ours, theirs = (read_metrics(folder / "dpo")["dpo/loss"] for folder in (tmp_path / "smoke", run.folder))
    assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-5)
