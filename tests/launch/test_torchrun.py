"""Several stages in the processes that torchrun started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import pipeline
from launch.settings import load

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests/smoke.yaml"
SHORT = ["--sft.epochs", "1", "--reward.epochs", "1", "--tracking.uri", "null"]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_two_reward_models_are_trained_one_after_the_other_and_the_group_is_left_cleanly(tmp_path: Path) -> None:
    settings = [*SHORT, "--runs_dir", str(tmp_path)]
    pipeline.run_stage(load(SMOKE, settings), "sft", True, None)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch.cli"]
    done = subprocess.run(
        [*launcher, "stage", "reward", str(SMOKE), *settings],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr  # what torch says of a group that was not left
    steps = [
        json.loads((tmp_path / "smoke/reward" / name / "artifact/manifest.json").read_text())["metrics"]["steps"]
        for name in ("helpfulness", "safety")
    ]
    assert all(count > 0 for count in steps)
