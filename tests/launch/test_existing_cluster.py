"""Clusters that do not answer, and those that are too small: real sockets, and a cluster's resources by hand."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from launch import existing_cluster, worker_group
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.errors import UserError

SMOKE = Path(__file__).parents[1] / "smoke.yaml"


def test_a_dead_address_is_refused_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(existing_cluster, "ANSWER_S", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # nobody listens
        begun = time.monotonic()
        with pytest.raises(UserError, match=f"no Ray cluster takes this run at {address}.*refused") as caught:
            existing_cluster.require_answer(address)
    assert time.monotonic() - begun < 30
    assert caught.value.exit_code == 5


def test_one_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a private Ray of another user, which `auto` finds."""
    monkeypatch.setattr(existing_cluster, "ANSWER_S", 2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="it has not answered for 2 s.*auto. also finds a private Ray") as caught:
            existing_cluster.require_answer(f"ray://127.0.0.1:{silent.getsockname()[1]}")
    assert caught.value.exit_code == 5


def config(*overrides: str) -> RunConfig:
    return load(SMOKE, ["--hardware.ray_address", "auto", "--hardware.placement_timeout_s", "600", *overrides])


def test_nodes_that_are_still_missing_are_waited_for_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(worker_group.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(worker_group.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    have = {"CPU": 1.0, "GPU": 0.0}
    monkeypatch.setattr(worker_group, "cluster_resources", lambda: have | {"CPU": 1.0 if now[0] < 300 else 2.0})
    worker_group._wait_for_room(config())
    assert 300 <= now[0] <= 302
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 workers × 1 CPUs = 2, but the cluster has 1, since " in said
    begun = now[0]
    with pytest.raises(
        UserError, match="8 workers × 1 CPUs = 8, but the cluster has 2. Lower hardware.workers"
    ) as caught:
        worker_group._wait_for_room(config("--hardware.workers", "8", "--sft.batch_size", "8"))
    assert caught.value.exit_code == 5 and 600 <= now[0] - begun <= 604
