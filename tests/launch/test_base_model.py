"""A base model of the hub: one commit for the whole run, one download for all workers of a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf.hub
from launch import base_model
from launch.settings import load
from rlhf.config import RunConfig, TinyConfig
from tests.hub import Hub

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests/smoke.yaml"
SHAPE = TinyConfig(vocab_size=280, hidden_size=32, intermediate_size=48, layers=2, heads=4)


@pytest.fixture
def config(tmp_path: Path, hub: Hub) -> RunConfig:
    """A run of `owner/name`, which the hub has."""
    folder = tmp_path / "on the hub"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub.add("owner/name", folder)
    return load(str(SMOKE), ["--model.path", "owner/name", "--runs_dir", str(tmp_path / "runs")])


def path_now(config: RunConfig) -> str:
    rlhf.hub._commit_now.cache_clear()  # as in another process
    return base_model.with_commit(config).model.path


def test_a_run_keeps_the_commit_with_which_it_began(config: RunConfig, hub: Hub) -> None:
    first = f"owner/name@{hub.commit('owner/name')}"
    assert path_now(config) == first
    hub.add("owner/name", hub.models["owner/name"])
    assert path_now(config) == first
    hub.refuses = (503, "")
    assert path_now(config) == first


def test_a_run_without_a_record_has_the_newest_commit(config: RunConfig, hub: Hub) -> None:
    first = path_now(config)
    hub.add("owner/name", hub.models["owner/name"])
    (config.folder / base_model.RECORD).unlink()
    assert path_now(config) == f"owner/name@{hub.commit('owner/name', 2)}" != first


def test_another_model_has_its_own_commit(config: RunConfig, hub: Hub) -> None:
    first = path_now(config)
    hub.add("owner/other", hub.models["owner/name"])
    other = config.model_copy(update={"model": config.model.model_copy(update={"path": "owner/other"})})
    assert path_now(other) == f"owner/other@{hub.commit('owner/other')}"
    assert path_now(config) == first


def test_only_the_first_rank_of_torchrun_records_it(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    path_now(config)
    assert not config.folder.exists()


@pytest.mark.parametrize("path", ["tiny", "."])
def test_other_models_are_left_alone(path: str, config: RunConfig, hub: Hub) -> None:
    local = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    assert base_model.with_commit(local) is local and hub.requests == []


# --- whole runs, on two workers of Ray --------------------------------------------------------------------------------


@pytest.fixture
def trainable(hub: Hub, tmp_path: Path) -> Hub:
    from rlhf.models import save_causal
    from rlhf.models.tiny import train_tokenizer, untrained_llama

    tokenizer = train_tokenizer(["hello there, how are you?", "fine, and you?"] * 5, SHAPE.vocab_size)
    save_causal(untrained_llama(SHAPE, tokenizer, seed=0), tmp_path / "model", tokenizer)
    hub.add("owner/name", tmp_path / "model")
    return hub


def run(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    own = ["--pipeline", "[sft]", "--sft.epochs", "1", "--sft.max_length", "512", "--tracking.uri", "null"]
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "run",
        str(SMOKE),
        "--model",
        "{path: owner/name}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *own, *settings],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_run_asks_the_hub_once_for_all_workers_and_once_for_all_time(trainable: Hub, tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    commit = trainable.commit("owner/name")
    assert trainable.downloads("model.safetensors") == trainable.downloads("config.json") == 1
    assert f"base model owner/name@{commit}" in done.stdout.replace("\n", "")
    settings = (tmp_path / "runs/smoke/sft/config.yaml").read_text()
    assert f"path: owner/name@{commit}\n" in settings
    trainable.add("owner/name", trainable.models["owner/name"])
    again = run(tmp_path)
    assert again.returncode == 0 and "sft: complete, with these settings and this data; skipped" in again.stdout
    assert json.loads((tmp_path / "runs/smoke" / base_model.RECORD).read_text()) == {
        "owner/name": f"owner/name@{commit}"
    }


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_a_hub_that_breaks_off_is_no_mistake_of_the_user(trainable: Hub, tmp_path: Path) -> None:
    trainable.lacks = "model.safetensors"
    done = run(tmp_path)
    assert done.returncode == 8, done.stdout + done.stderr
    assert "sft failed: " in done.stderr and "the hub cannot be reached" in done.stderr
