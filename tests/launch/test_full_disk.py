"""A disk that gets full while a stage writes: it ends with its cause, and goes on when there is space again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.tracking import read_metrics
from tests.faults.runs import SMOKE, checkpoints, rlhf, steps, wait_for
from tests.faults.storage import fill, needs_root, small_disk

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900), needs_root]

STAGE = ["stage", "sft", str(SMOKE), "--local", "--tracking.uri", "null", "--sft.packing", "false"]
MANY = ["--sft.epochs", "12", "--sft.checkpoints", "23"]


def test_it_ends_with_exit_code_5_and_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "runs", megabytes=640):
        process, folder = rlhf(tmp_path, *STAGE, *MANY), tmp_path / "runs/smoke/sft"
        wait_for(lambda: checkpoints(folder), process)
        filler = fill(tmp_path / "runs")
        shown, _ = process.communicate(timeout=300)
        assert process.returncode == 5 and "full" in shown, shown
        assert checkpoints(folder)
        filler.unlink()
        process = rlhf(tmp_path, *STAGE, *MANY)
        shown, _ = process.communicate(timeout=600)
        assert process.returncode == 0, shown
        assert [step for step, _ in read_metrics(folder)["sft/loss"]] == list(range(1, 12 * 32 + 1))
        assert steps(folder).count(1) == 1  # it did not start over
