"""What several processes of one server share: machines, metrics, votes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from launch import cli
from launch.serve.merged_metrics import merged
from launch.serve.replicas import check_store, resources
from rlhf.errors import UserError
from rlhf.serving.store import Exchange, Store, Writer
from tests.launch.serve.servers import free_port, running


@pytest.mark.parametrize(
    ("cpus", "replicas", "each"),
    [([8], 2, 4), ([8], 3, 2), ([8], 8, 1), ([8, 8], 3, 4), ([8, 8], 2, 8), ([2, 16], 3, 5), ([1, 1], 2, 1)],
)
def test_as_many_cpus_as_let_all_replicas_fit(cpus: Sequence[int], replicas: int, each: int) -> None:
    """By hand: 16 CPUs hold three replicas of 5, and of 6 only two; the two of a small node are left over."""
    assert resources([{"CPU": float(own)} for own in cpus], replicas) == {"num_cpus": each, "num_gpus": 0}


def test_each_replica_has_a_gpu_where_there_are_some() -> None:
    nodes = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 4.0}]
    assert resources(nodes, 3) == {"num_cpus": 1, "num_gpus": 1}
    with pytest.raises(UserError, match="Ray has 3"):
        resources(nodes, 4)
    with pytest.raises(UserError, match="needs a CPU, and Ray has 2"):
        resources([{"CPU": 2.0}], 3)


def test_several_machines_share_no_sqlite_file() -> None:
    for store, machines in (("sqlite:////a/f.db", 1), ("postgresql://a/b", 3), (None, 3)):
        check_store(store, machines)
    with pytest.raises(UserError, match="2 machines cannot share") as raised:
        check_store("sqlite:////a/f.db", 2)
    assert raised.value.exit_code == 2


def test_metrics_of_replicas_are_one_text_that_prometheus_reads() -> None:
    texts = {}
    for number, replica in enumerate(("a", "b"), 1):
        registry = CollectorRegistry()
        Counter("asked", "Requests", ["route"], registry=registry).labels('/x"} 1').inc(number)
        Counter("plain", "Without labels", registry=registry).inc(10 * number)
        Histogram("took", "Time", buckets=(1, 2), registry=registry).observe(1.5)
        texts[replica] = generate_latest(registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(merged(texts))}
    found = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in families["asked"].samples}
    assert found["asked_total", ("replica", "a"), ("route", '/x"} 1')] == 1
    assert found["asked_total", ("replica", "b"), ("route", '/x"} 1')] == 2
    assert {s.labels["replica"]: s.value for s in families["plain"].samples if s.name == "plain_total"} == {
        "a": 10,
        "b": 20,
    }
    buckets = {(s.labels["replica"], s.labels["le"]): s.value for s in families["took"].samples if "le" in s.labels}
    assert buckets == {(name, le): float(le != "1.0") for name in "ab" for le in ("1.0", "2.0", "+Inf")}
    assert merged(texts).count("# TYPE asked_total") == 1


def test_a_vote_waits_for_the_response_that_another_process_keeps(folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/f.db"
    said = [{"role": "user", "content": "hello"}]
    late = Exchange("chatcmpl-1:0", "chat", "tiny", None, said, "it is 4", "stop", 3, 2, 0.5, {})

    def keep() -> None:
        time.sleep(0.5)
        other = Store(url)
        other.add([late])
        other.close()

    for others, status in ((None, 404), (object(), 200)):
        with running(folder, writer=Writer(Store(url)), others=others) as server, server.http() as http:
            if others:
                threading.Thread(target=keep).start()
            assert http.post("/v1/votes", json={"first": late.id, "thumb": "up"}).status_code == status
            assert http.post("/v1/votes", json={"first": "chatcmpl-2:0", "thumb": "up"}).status_code == 404


def test_replicas_need_what_is_installed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "grpc_reflection", None)
    assert cli.main(["serve", str(folder), "--replicas", "2", "--port", str(free_port()), "--store", "none"]) == 2
    assert "pip install '.[serve-cluster]'" in capsys.readouterr().err
