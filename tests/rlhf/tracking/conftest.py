"""A store of MLflow, made once by two processes at the same time."""

import os
import subprocess
import sys

import pytest

from rlhf.config import TrackingConfig
from tests.rlhf.tracking.recorded import ROOT

TRACK_ONE_RUN = """
import sys
from pathlib import Path
from rlhf.config import TrackingConfig
from rlhf.tracking import mlflow_sync, open_tracker
mlflow_sync.CLOSE_LIMIT_S = 120
tracker = open_tracker(Path(sys.argv[1]), TrackingConfig(uri=sys.argv[2], experiment="tests"), "first", None, is_writer=True)
tracker.metrics({"loss": 1.0}, step=0)
tracker.close()
"""


@pytest.fixture(scope="session")
def first_use(tmp_path_factory):
    """Two processes that start on a store that is not there yet: its settings, and what they printed."""
    folder = tmp_path_factory.mktemp("store")
    settings = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="tests")
    commands = [[sys.executable, "-c", TRACK_ONE_RUN, folder / name, settings.uri or ""] for name in ("one", "two")]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, cwd=folder, env=environment, **output) for command in commands]
    return settings, [process.communicate()[0] for process in processes]


@pytest.fixture(scope="session")
def store(first_use):
    return first_use[0]


@pytest.fixture
def store_client(store):
    from mlflow import MlflowClient

    return MlflowClient(store.uri)
