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


# With these first, two workers end together: the runs below take minutes each, most other files seconds.
LONGEST_FIRST = [
    "launch/test_worker_group.py",
    "launch/test_deaths.py",
    "launch/test_base_model.py",
    "launch/test_stop.py",
    "launch/test_dpo_run.py",
    "launch/test_sweep_run.py",
    "launch/test_evaluate_reward.py",
    "launch/test_function_reward.py",
    "launch/test_listening.py",
    "proofs/test_layout.py",
    "proofs/test_resume.py",
]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


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
