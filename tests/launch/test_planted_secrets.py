"""Credentials in the environment, in addresses, settings and git are in no file, log, database or line of the terminal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch import worker
from launch.settings import load
from rlhf.config import TrackingConfig, without_secrets
from rlhf.tracking import base, fill_in, open_tracker
from tests.rlhf.test_config import run_config

ROOT = Path(__file__).parents[2]
MARK = "pl4nted"  # in every planted value
PLANTED = {
    "HF_TOKEN": f"hf_{MARK}AAAAAAAAAAAAAAAAAAAA1",
    "MLFLOW_TRACKING_USERNAME": "ann",
    "MLFLOW_TRACKING_PASSWORD": f"{MARK}-pass word/2",
    "OPENAI_API_KEY": f"sk-{MARK}-3333333333333333",
    "AWS_ACCESS_KEY_ID": f"AKIA{MARK}44444444",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/555555555555+5",
    "AWS_SESSION_TOKEN": f"{MARK}=6666666666",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "remote.origin.url",
    "GIT_CONFIG_VALUE_0": f"https://ann:{MARK}7@127.0.0.1/code.git",
}
URI = f"http://ann:{MARK}8@127.0.0.1:1"  # nothing listens there
SMALL = ["--sft.epochs", "1", "--sft.checkpoints", "1", "--hardware.workers", "1", "--pipeline", "[sft]"]


def leave(runs: Path, *words: str, **variables: str) -> str:
    """Runs SFT, in `runs`/smoke, and returns what it shows."""
    command = [sys.executable, "-m", "launch.cli", *words, "--runs_dir", str(runs), "--tracking.uri", URI, *SMALL]
    own = {**os.environ, **PLANTED, **variables}
    done = subprocess.run(command, check=False, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a stage leaves behind and what it shows."""
    runs = tmp_path_factory.mktemp("runs")
    shown = leave(runs, "stage", "sft", "tests/smoke.yaml", "--local")
    return runs / "smoke", shown


def holding(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5
    return [str(path.relative_to(folder)) for path in files if MARK.encode() in path.read_bytes()]


@pytest.mark.integration
def test_no_file_of_a_run_and_no_line_shown_holds_any(left: tuple[Path, str]) -> None:
    run, shown = left
    assert (run / "sft/artifact/manifest.json").exists()
    assert holding(run) == []
    assert MARK not in shown


@pytest.mark.proof
def test_no_log_of_ray_holds_any(tmp_path: Path) -> None:
    ray = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))  # Ray's sockets need a short path
    try:
        leave(tmp_path, "run", "tests/smoke.yaml", RAY_TMPDIR=str(ray), TMPDIR=str(ray))
        assert holding(ray) == []
    finally:
        shutil.rmtree(ray, ignore_errors=True)


@pytest.mark.integration
def test_mlflow_gets_none(left: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(left[0], tmp_path / "smoke")
    monkeypatch.chdir(tmp_path)
    settings = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    for state in (tmp_path / "smoke").rglob("mlflow.json"):
        state.unlink()  # the server that was not there
    assert fill_in(tmp_path / "smoke/sft", settings)
    assert holding(tmp_path) == []


def test_every_kind_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    for value in (*PLANTED.values(), f"Authorization: Bearer {MARK}99999", f"{URI}/api?token={MARK}"):
        assert MARK not in without_secrets(f"no answer ({value}): 401")
    assert without_secrets({"a": [PLANTED["HF_TOKEN"], 1]}) == {"a": ["***", 1]}


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:5000/#/experiments/1", "ask-a-long-and-winding-question", "keys: 12"]
)
def test_ordinary_text_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_an_error_that_tells_a_key_is_kept_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED["OPENAI_API_KEY"])
    config = run_config().model_copy(update={"runs_dir": tmp_path})
    worker.note_failure(config, "sft", RuntimeError(f"key {PLANTED['OPENAI_API_KEY']} was refused"))
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 2 and all("was refused" in text and MARK not in text for text in kept)


def test_a_changed_file_of_the_code_is_kept_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "code_diff", lambda: f'+token = "{PLANTED["HF_TOKEN"]}"\n+uri = "{URI}"\n')
    settings = load(ROOT / "tests/smoke.yaml", ["--tracking.uri", "null"]).tracking
    open_tracker(tmp_path, settings, "sft", "", True).close()
    kept = (tmp_path / "git.diff").read_text()
    assert '+token = "***"' in kept and "+uri =" in kept and MARK not in kept
