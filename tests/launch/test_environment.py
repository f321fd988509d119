"""What of the driver's environment reaches workers on other machines, and by which way."""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest

from launch.attempt import Attempt, _unpack
from launch.connection import ray_arguments
from launch.environment import SUBMITTED, carried
from rlhf.config import RunConfig
from tests.rlhf.test_config import run_config

GIVEN = {
    "HF_HOME": "/shared/hub",
    "NCCL_SOCKET_IFNAME": "ib0",
    "GLOO_SOCKET_IFNAME": "eth0",
    "MLFLOW_TRACKING_USERNAME": "me",
}
SECRETS = {"HF_TOKEN": "hf_planted", "HF_ENDPOINT": "https://me:planted@hub", "MLFLOW_TRACKING_PASSWORD": "plant"}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    for name in [name for name in os.environ if name.startswith(("HF_", "NCCL_", "GLOO_", "MLFLOW_TRACKING_"))]:
        monkeypatch.delenv(name)
    for name, value in {**GIVEN, **SECRETS, "AWS_SECRET": "planted", "MY_HF_HOME": "x"}.items():
        monkeypatch.setenv(name, value)
    return run_config()


def test_settings_go_with_the_job_and_secrets_do_not(config: RunConfig) -> None:
    arguments = ray_arguments("auto")
    assert arguments["runtime_env"] == {"env_vars": GIVEN}
    assert "planted" not in str(arguments)
    assert "runtime_env" not in ray_arguments(None)


def test_secrets_reach_the_worker_in_its_payload(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = {
        "settings": config.model_dump(mode="json"),
        "claim": None,
        "secrets": carried(secret=True),
        "attempt": asdict(Attempt("sft", "attempt-1", 2, "")),
    }
    assert payload["secrets"] == SECRETS
    for name in SECRETS:
        monkeypatch.delenv(name)
    _unpack(payload)
    assert {name: os.environ[name] for name in SECRETS} == SECRETS


def test_a_submitted_job_has_variables_of_its_own(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a variable that both the job and the driver give."""
    monkeypatch.setenv(SUBMITTED, "{}")
    assert "runtime_env" not in ray_arguments("auto")
