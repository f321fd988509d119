"""What every test stands on: one thread, no network, quiet libraries, fixed seeds, a run folder of its own."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DS_ACCELERATOR": "cpu",
    "MPLBACKEND": "agg",
}
os.environ.update(QUIET)  # before any of these libraries is imported, and inherited by the processes that tests start

import hypothesis
import numpy as np
import pytest

from tests.hub import hub  # noqa: F401

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # tests of the leaves without torch stay quick
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `runs/`, in a working directory of its own, so that no test writes into the project."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder
