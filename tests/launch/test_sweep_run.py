"""`rlhf sweep` as people start it: on Ray, with a cell that fails, into MLflow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rlhf.runs.lineage import trace

ROOT = Path(__file__).parents[2]
TINY = """
name: tiny
pipeline: [sft, dpo]
model: {path: tiny, tiny: {vocab_size: 320, hidden_size: 16, intermediate_size: 32, layers: 1, heads: 1}}
data:
  demonstrations: {train: [{path: shipped, limit: 32}], held_out: [{path: shipped, split: held_out, limit: 8}]}
  preferences: {train: [{path: shipped, limit: 16}], held_out: [{path: shipped, split: held_out, limit: 8}]}
sft: {epochs: 1, batch_size: 8, micro_batch_size: 8, max_length: 192, evals: 1, checkpoints: 1}
dpo: {epochs: 1, batch_size: 8, micro_batch_size: 8, evals: 1, checkpoints: 1}
"""
GOOD, BAD = "max_length-192-seed-0", "max_length-4-seed-0"  # no pair fits into 4 tokens
PARENT = "mlflow.parentRunId"

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def rlhf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_a_cell_fails_alone_and_stages_are_shared_in_folders_and_mlflow(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = ["sweep", "tiny.yaml", "--dpo.max_length", "192", "4"]
    done = rlhf(tmp_path, *command)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"1 of 2 cells failed: {BAD}" in done.stderr
    assert re.search(rf"{BAD}\s+failed: dpo failed: ", done.stdout)
    runs = tmp_path / "runs/tiny-sweep"
    assert (runs / GOOD / "report.md").exists() and not (runs / BAD / "report.md").exists()
    weights = [runs / cell / "sft/artifact/model.safetensors" for cell in (GOOD, BAD)]
    assert weights[0].samefile(weights[1])
    assert list(trace(runs / GOOD / "dpo/artifact").faults()) == []

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = {run.info.run_id: run for run in client.search_runs(["1"])}
    below = sorted(
        (run.info.run_name, parent and found[parent].info.run_name, run.info.status)
        for run in found.values()
        for parent in [run.data.tags.get(PARENT, "")]
    )
    assert below == sorted(
        [
            ("tiny-sweep", "", "FAILED"),
            (GOOD, "tiny-sweep", "FINISHED"),
            (BAD, "tiny-sweep", "FAILED"),
            ("sft", GOOD, "FINISHED"),
            ("dpo", GOOD, "FINISHED"),
            ("dpo", BAD, "FAILED"),
        ]
    )
    again = rlhf(tmp_path, "run", str(runs / GOOD / "run.yaml"))
    assert again.returncode == 0 and "sft: complete" in again.stdout and "dpo: complete" in again.stdout
