"""Each check of `rlhf doctor` by itself, on nodes that are made up."""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import combinations
from pathlib import Path

import pytest

from launch.doctor import facts, network, nodes, room, services, storage
from launch.doctor.command import FINE
from launch.doctor.examine import _silent
from launch.doctor.examiner import names
from launch.doctor.facts import NodeFacts
from launch.doctor.result import CheckResult, ok, raise_failed
from launch.preflight import preflight_errors_by_check
from launch.settings import load
from rlhf.config import TrackingConfig
from rlhf.errors import UserError
from rlhf.tracking import why_unreachable

NODE = NodeFacts(
    versions={"python": "3.12.1", "torch": "2.13.0", "ray": "2.60.0"},
    code={"rlhf/errors.py": "aa", "stages/sft.py": "bb"},
    model={"config.json": 700, "model.safetensors": 26_000},
    shm_bytes=8_000_000_000,
    open_files=65_536,
    disk_bytes=1_000_000_000_000,
    disk_rate=900e6,
    extension=True,
    gpus=("H100, driver 580.1",) * 8,
    interfaces=("eth0", "ib0"),
    chosen_interface="ib0",
)


def found(check, odd: dict[str, object] | None = None, *arguments) -> list[tuple[str, str, str]]:
    """Where, verdict and why, for four nodes of which the third has something of its own."""
    three = dataclasses.replace(NODE, **(odd or {}))
    results = check({"n1": NODE, "n2": NODE, "n3": three, "n4": NODE}, *arguments)
    return [(one.where, one.verdict, one.why) for one in results]


@pytest.mark.parametrize(
    ("check", "odd", "arguments", "verdict", "why"),
    [
        (nodes.same_versions, {"versions": {**NODE.versions, "torch": "2.12.0"}}, (), "failed", "torch 2.12.0 and not 2.13.0"),
        (nodes.same_code, {"code": {**NODE.code, "stages/sft.py": "cc"}}, (), "failed", "files of this project differ from those of the other nodes (1): stages/sft.py"),
        (nodes.same_code, {"code": {}}, (), "failed", "files of this project differ from those of the other nodes (2): rlhf/errors.py, stages/sft.py"),
        (nodes.same_model, {"model": {"config.json": 700}}, (), "failed", "model.safetensors missing"),
        (nodes.same_model, {"model": {**NODE.model, "model.safetensors": 25_000}}, (), "failed", "model.safetensors of another size"),
        (nodes.memory_to_share, {"shm_bytes": 64_000_000}, (), "warning", "0.1 GB are free, under 1 GB"),
        (nodes.limits, {"open_files": 1024}, (), "warning", "a process may open 1024 files; Ray needs more with many workers"),
        (nodes.disks, {"disk_bytes": 300_000_000_000}, (312_000_000_000,), "failed", "about 312.0 GB are needed in runs_dir, 300.0 GB are free"),
        (nodes.disks, {"disk_rate": 10e6}, (1_000_000_000,), "warning", "runs_dir takes 10 MB/s, a checkpoint 100 s"),
        (nodes.interfaces, {"interfaces": ("eth0", "eth1")}, (), "failed", "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME is ib0, but there are eth0, eth1"),
        (nodes.interfaces, {"chosen_interface": None}, (), "warning", "there are eth0, ib0, and none is chosen"),
        (nodes.extensions, {"extension": False}, (), "warning", "DeepSpeed's CPU communication is not compiled; the first stage waits a minute for it"),
        (nodes.graphics, {"gpus": ("A100, driver 580.1",)}, (), "warning", f"A100, driver 580.1; on most nodes {', '.join(NODE.gpus)}"),
    ],
)  # fmt: skip
def test_the_odd_node_is_named(check, odd: dict[str, object], arguments: tuple, verdict: str, why: str) -> None:
    assert found(check, odd, *arguments) == [("n3", verdict, why)]
    ((where, usual, _),) = found(check, None, *arguments)
    assert (where, usual) == ("", "ok")


def test_of_two_nodes_that_differ_the_drivers_is_right() -> None:
    one, other = NODE, dataclasses.replace(NODE, code={**NODE.code, "stages/sft.py": "cc"})
    assert [result.where for result in nodes.same_code({"driver": one, "other": other})] == ["other"]
    assert [result.where for result in nodes.same_code({"driver": other, "other": one})] == ["other"]


def test_a_model_that_only_the_drivers_node_has_is_missing_on_the_others() -> None:
    without = dataclasses.replace(NODE, model={})
    results = nodes.same_model({"driver": NODE, "n2": without, "n3": without})
    assert [(one.where, one.why) for one in results] == [
        (node, "config.json, model.safetensors missing") for node in ("n2", "n3")
    ]


def test_without_any_gpu_a_run_on_gpus_fails() -> None:
    without = dataclasses.replace(NODE, gpus=())
    (result,) = nodes.graphics({"n1": without, "n2": without})
    assert (result.verdict, result.what_to_do) == ("failed", "set hardware.gpus_per_worker: 0")
    assert [one.verdict for one in nodes.graphics({"head": without, "n2": NODE})] == ["ok"]


@pytest.mark.parametrize(("chosen", "why"), [(None, "eth0, ib0"), ("lo", "lo")])
def test_one_node_may_choose_none_or_loopback(chosen: str | None, why: str) -> None:
    (result,) = nodes.interfaces({"n1": dataclasses.replace(NODE, chosen_interface=chosen)})
    assert (result.verdict, result.why) == ("ok", why)


@pytest.mark.parametrize(
    ("skew", "exactness", "verdict", "why"),
    [
        (0.5, 0.1, "ok", "within 0.600 s of this machine"),
        (2.5, 0.7, "ok", "within 3.200 s of this machine"),
        (3.0, 0.5, "warning", "3.0 s ahead of this machine: heartbeats and logs are misread"),
        (-40.0, 0.5, "failed", "40.0 s behind this machine: heartbeats and logs are misread"),
    ],
)
def test_clocks_are_judged_by_what_is_certain(skew: float, exactness: float, verdict: str, why: str) -> None:
    (result,) = nodes.clocks({"n2": (skew, exactness)})
    assert (result.verdict, result.why) == (verdict, why)


# --- what a node says of itself ---------------------------------------------------------------------------------------


def test_a_node_says_what_can_be_looked_up_in_other_ways(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = facts.gather(tmp_path, tmp_path)
    import torch

    assert told.versions["torch"] == torch.__version__
    assert told.model == {"config.json": 2}
    assert told.code.keys() >= {"launch/doctor/facts.py", "rlhf/errors.py", "stages/base.py"}
    assert told.disk_rate > 0 and [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_changed_line_changes_the_digest_of_its_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package"
    package.mkdir()
    for name in ("__init__.py", "one.py", "two.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(facts, "CODE", ("some_package",))
    before = facts.code_digests()
    (package / "two.py").write_text("x = 2\n")
    after = facts.code_digests()
    assert {name for name in before if before[name] != after[name]} == {"some_package/two.py"}


# --- storage ----------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_and_what_is_late_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 1.0)
    storage.write(tmp_path, "a", "new")
    storage.write(tmp_path, "b", "old")
    late = threading.Timer(0.4, storage.write, (tmp_path, "b", "new"))
    late.start()
    seen = storage.read(tmp_path, ["a", "b", "c"], "new")
    late.join()
    assert seen["a"] is not None and seen["a"] < 0.2
    assert seen["b"] is not None and seen["b"] > 0.3
    assert seen["c"] is None


@pytest.mark.parametrize(
    ("new", "replaced", "verdicts"),
    [
        (0.1, 0.1, ["ok"]),
        (None, None, ["failed"]),
        (0.1, None, ["warning"]),
        (0.1, 4.0, ["warning"]),
        (4.0, 0.1, ["warning"]),
    ],
)
def test_storage_is_judged_by_the_node_that_reads(
    new: float | None, replaced: float | None, verdicts: list[str]
) -> None:
    first = {"n1": {"n1": 0.0, "n2": 0.1}, "n2": {"n1": new, "n2": 0.0}}
    second = {"n1": {"n1": 0.0, "n2": 0.1}, "n2": {"n1": replaced, "n2": 0.0}}
    results = list(storage.judge([first, second], Path("runs")))
    assert [one.verdict for one in results] == verdicts
    assert results[0].where == ("" if verdicts == ["ok"] else "n2")


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 10))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count: int) -> None:
    names = [f"n{number}" for number in range(count)]
    played = network.rounds(names)
    assert sorted(tuple(sorted(pair)) for one in played for pair in one) == sorted(combinations(names, 2))
    for one in played:
        members = [name for pair in one for name in pair]
        assert len(members) == len(set(members))
    assert len([one for one in played if one]) == (0 if count < 2 else count - 1 + count % 2)


def test_a_pair_that_cannot_talk_or_is_slow_is_named() -> None:
    quick, slow = (0.001, 1e9), (0.4, 1e9)
    results = list(network.judge({("a", "b"): quick, ("a", "c"): "timed out", ("b", "c"): slow}, None))
    assert [(one.where, one.verdict) for one in results] == [("a and c", "failed"), ("b and c", "warning")]
    results = list(network.judge({("a", "b"): quick, ("a", "c"): (0.002, 5e8)}, (0.003, 4e8)))
    assert [one.why for one in results] == [
        "2 pairs of nodes, all-reduce of one number in 2.0 ms, of 4 MB at 500 MB/s or better",
        "all-reduce of one number in 3.0 ms, of 4 MB at 400 MB/s",
    ]
    assert [one.verdict for one in network.judge({("a", "b"): quick}, "timed out")] == ["ok", "failed"]


def test_two_ranks_that_meet_are_timed_and_one_alone_gives_up() -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address, timings = ("127.0.0.1", store.port), {}

    def rank(number: int) -> None:
        timings[number] = network.all_reduce(address, "both", number, 2, False, 20.0)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    assert all(0 < seconds < 5 and rate > 1e5 for seconds, rate in timings.values()) and len(timings) == 2
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        network.all_reduce(address, "alone", 0, 2, False, 1.0)
    assert time.monotonic() - began < 10


# --- room, services, and what becomes of it ---------------------------------------------------------------------------


def test_a_worker_lies_on_one_node() -> None:
    assert room.places([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0, "GPU": 0.0}) == 2  # of six CPUs three pairs
    assert room.places([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 4.0}], {"CPU": 4.0, "GPU": 1.0}) == 8
    assert room.places([{"CPU": 16.0, "GPU": 8.0}], {"CPU": 4.0, "GPU": 1.0}) == 4


def test_a_run_that_does_not_fit_is_refused_in_numbers() -> None:
    config = load("quickstart", ["--hardware", "{workers: 4, cpus_per_worker: 2}"])
    (result,) = room.judge(config, [{"CPU": 3.0}] * 3)
    assert result.why == "4 workers with 2 CPUs each are wanted, and there is room for 3 on 3 nodes"
    assert [one.verdict for one in room.judge(config, [{"CPU": 4.0}] * 2)] == ["ok"]


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(401)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    """Host and port of a server that takes no credentials."""
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_refuses_the_password_is_told_from_one_that_is_not_there(refusing: str) -> None:
    refused = why_unreachable(TrackingConfig(uri=f"http://me:hunter2@{refusing}"))
    assert refused and refused[0].startswith("it refuses the credentials") and "hunter2" not in refused[0]
    absent = why_unreachable(TrackingConfig(uri="http://127.0.0.1:9"))
    assert absent and absent[0].startswith("it cannot be reached")
    assert why_unreachable(TrackingConfig(uri=None)) is None


def test_what_nodes_see_of_the_tracking_server_is_said_without_its_password() -> None:
    config = load("quickstart", ["--tracking.uri", "http://me:hunter2@mlflow:5000"])
    results = list(services.tracking(config, {"n1": None, "n2": ("it cannot be reached: x", "start it")}))
    assert [(one.where, one.verdict, one.exit_code) for one in results] == [("n2", "failed", 8)]
    assert "hunter2" not in results[0].why
    down = ("it cannot be reached: x", "start it")
    assert [one.where for one in services.tracking(config, {"n1": down, "n2": down})] == ["all nodes"]
    sqlite = load("quickstart", ["--tracking.uri", "sqlite:///mlflow.db"])
    assert [one.verdict for one in services.tracking(sqlite, {"n1": None, "n2": None})] == ["warning"]
    assert [one.verdict for one in services.tracking(sqlite, {"n1": None})] == ["ok"]


def test_nodes_are_named_by_host_and_by_address_only_where_hosts_are_alike() -> None:
    assert names([("a", "10.0.0.1"), ("b", "10.0.0.2")]) == ["a", "b"]
    assert names([("a", "10.0.0.1"), ("b", "10.0.0.2"), ("a", "10.0.0.3")]) == ["a (10.0.0.1)", "b", "a (10.0.0.3)"]


def test_what_a_node_raised_becomes_a_row() -> None:
    assert _silent("n2", TimeoutError("no answer in 45 s")).check == "node"
    full = _silent("n2", OSError(errno.ENOSPC, "No space left on device"))
    assert (full.check, full.verdict) == ("storage", "failed") and "No space left" in full.why
    assert "same revision" in _silent("n2", ModuleNotFoundError("No module named 'launch.doctor'")).what_to_do


def test_all_that_failed_is_raised_with_the_first_exit_code() -> None:
    warned = CheckResult("limits", "n1", "warning", "few files", "ulimit")
    raise_failed([ok("code", "the same"), warned])
    failed = [
        CheckResult("model files", "n2", "failed", "x missing", "copy it", 4),
        CheckResult("disk", "", "failed", "full"),
    ]
    with pytest.raises(UserError) as caught:
        raise_failed([warned, *failed])
    assert caught.value.message == "the run cannot start:\n  model files, n2: x missing: copy it\n  disk: full"
    assert caught.value.exit_code == 4


def test_every_check_of_rlhf_run_has_a_word_for_nothing_found() -> None:
    assert preflight_errors_by_check(load("quickstart", []), workers=True).keys() == FINE.keys()
