"""`rlhf serve --replicas 2` on a private Ray: requests reach both, one is killed and comes back, the end is in order."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from launch.serve.command import TOKEN as TOKEN_VARIABLE
from rlhf.serving.store import Store
from tests.launch.serve.servers import TOKEN, free_port, until

ROOT = Path(__file__).parents[3]
CLIENTS, LONG = 6, 1000
START_S = 300


class Served(NamedTuple):
    process: subprocess.Popen
    http: httpx2.Client
    log: Path

    @property
    def replicas(self) -> set[int]:
        """The processes."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return {each.pid for each in found if " ".join(_command(each)).startswith("ray::ServeReplica")}

    def requests(self) -> dict[str, float]:
        """Requests of /predict, by replica."""
        found = self.http.get("/metrics")
        families = text_string_to_metric_families(found.text if found.status_code == 200 else "")
        samples = [sample for family in families for sample in family.samples]
        counts = {sample.labels["replica"]: 0.0 for sample in samples}
        for sample in samples:
            if sample.name == "rlhf_serve_requests_total" and sample.labels["route"] == "/predict":
                counts[sample.labels["replica"]] += sample.value
        return counts


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def serving(policy: Path, at: Path) -> Iterator[Served]:
    port = free_port()
    command = [sys.executable, "-m", "launch.cli", "serve", str(policy), "--replicas", "2", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), TOKEN_VARIABLE: TOKEN}
    with (at / "log").open("w") as out:
        process = subprocess.Popen([*command, "--rate", "0"], env=environment, cwd=at, stdout=out, stderr=out)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120) as http:
            served = Served(process, http, at / "log")
            until(lambda: process.poll() is not None or "kept:" in served.log.read_text(), START_S)
            assert process.poll() is None, served.log.read_text()
            yield served
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
        process.wait()


def ask(http: httpx2.Client, tokens: int = 4) -> int:
    """The status; 599 where the connection broke."""
    try:
        return http.post("/predict", json={"text": "hello", "max_tokens": tokens}).status_code
    except httpx2.HTTPError:
        return 599


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_two_replicas_share_the_work_and_one_that_dies_comes_back(folder: Path, tmp_path: Path) -> None:
    with serving(folder, tmp_path) as served:
        http = served.http
        assert [http.get("/v1/models", headers={"Authorization": "no"}).status_code, ask(http)] == [401, 200]
        with ThreadPoolExecutor(CLIENTS) as clients:
            assert set(clients.map(lambda _: ask(http), range(40))) == {200}
        before = served.requests()
        assert len(before) == 2 and min(before.values()) > 0 and sum(before.values()) == 41
        votes_at_once(http)
        all_listen_on_loopback(served)
        one_dies(served, set(before))
        stops(served)
    kept = Store(f"sqlite:///{tmp_path}/feedback/feedback.db")
    assert LONG in {row.completion_tokens for row in kept.exchanges().values()}  # the one that ran at the stop
    assert len(kept.votes()) == 5
    kept.close()


def votes_at_once(http: httpx2.Client) -> None:
    """Also where the other replica gets the vote."""
    for _ in range(5):
        name = http.post("/predict", json={"text": "hello", "max_tokens": 2}).json()["id"]
        assert http.post("/v1/votes", json={"first": name, "thumb": "up"}).status_code == 200


def all_listen_on_loopback(served: Served) -> None:
    seen = 0
    for each in psutil.Process(served.process.pid).children(recursive=True):
        for one in each.net_connections("inet"):
            if one.status == psutil.CONN_LISTEN:
                ip = ipaddress.ip_address(one.laddr.ip)
                assert (getattr(ip, "ipv4_mapped", None) or ip).is_loopback, (_command(each), ip)
                seen += 1
    assert seen > 4


def one_dies(served: Served, before: set[str]) -> None:
    """Lost are at most the requests that ran; all that come later are answered, and there are two again."""
    first, done = served.replicas, threading.Event()
    statuses: list[int] = []

    def client() -> None:
        while not done.is_set():
            statuses.append(ask(served.http, tokens=20))

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for each in threads:
        each.start()
    until(lambda: len(statuses) > 2 * CLIENTS)
    os.kill(min(first), signal.SIGKILL)
    until(lambda: len(served.replicas - first) == 1 and len(served.replicas) == 2, START_S)
    until(lambda: set(served.requests()) - before and len(served.requests()) == 2, START_S)
    done.set()
    for each in threads:
        each.join()
    lost = [status for status in statuses if status != 200]
    assert len(lost) <= CLIENTS and all(status >= 500 for status in lost), Counter(statuses)
    assert len(set(served.requests()) - before) == 1


def stops(served: Served) -> None:
    """While a response runs, which is told to its end."""
    begun, told = threading.Event(), []

    def stream() -> None:
        asked = {"prompt": "hello", "max_tokens": LONG, "temperature": 0, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=asked) as response:
            for line in response.iter_lines():
                begun.set()
                told.append(line)

    reading = threading.Thread(target=stream)
    reading.start()
    assert begun.wait(60)
    served.process.send_signal(signal.SIGTERM)
    until(lambda: ask(served.http) == 503 or not reading.is_alive())
    reading.join(120)
    assert served.process.wait(120) == 0, served.log.read_text()
    assert "data: [DONE]" in told
