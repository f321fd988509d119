"""What listens on pseudo-nodes, as the system tells it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import psutil

from launch.existing_cluster import PROBE
from launch.testbed import Testbed
from tests.launch import test_listening

# Says what listens on the node where it runs, again and again, each line once.
WATCH = """
import json, time
import psutil

said = set()
while True:
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            addresses = {one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}
        except psutil.Error:  # it has ended
            continue
        for line in {json.dumps([words, address]) for address in addresses} - said:
            print(line, flush=True)
            said.add(line)
    time.sleep(2)
"""
KINDS = test_listening.KINDS | {
    "ray.util.client.server": "Ray's server for clients (10001)",
    PROBE: test_listening.KINDS["launch.cli"],
}
PLACES = {"0.0.0.0": "all interfaces", "::": "all interfaces", "127.0.0.1": "127.0.0.1", "::1": "127.0.0.1"}
NODES = "10.77.0."


class Listening:
    """Watches nodes until `found` is asked."""

    def __init__(self, testbed: Testbed, nodes: Sequence[int]) -> None:
        command = [sys.executable, "-c", WATCH]
        self._watchers = {node: testbed.popen(node, command, stdout=subprocess.PIPE) for node in nodes}

    def found(self) -> dict[int, set[tuple[str, str]]]:
        """(process, where) of all that has listened on each of them, in the words of the page on security."""
        found = {}
        for node, watcher in self._watchers.items():
            for process in psutil.Process(watcher.pid).children(recursive=True):
                process.kill()
            shown, _ = watcher.communicate(timeout=60)
            said = map(json.loads, shown.splitlines())
            found[node] = {(kind(words), place(address)) for words, address in said if words}  # else it was ending
        return found


def kind(words: str) -> str:
    return next((name for part, name in KINDS.items() if part in words), words)


def place(address: str) -> str:
    plain = address.removeprefix("::ffff:")
    return PLACES.get(plain, "the node's address" if plain.startswith(NODES) else address)
