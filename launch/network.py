"""Which nodes of the cluster the driver reaches.

A node that is cut off may still write to the shared storage, where its ranks look alive, and Ray takes more than a minute
to give it up. So the driver tries a connection to the Ray of every node, every few seconds.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

PERIOD_S = 5.0  # between two tries
ANSWERS_S = 5.0  # a slow line with losses answers by then
AT_ONCE = 64


@dataclass(frozen=True)
class Node:
    host: str
    address: str
    port: int
    resources: Mapping[str, float] = field(hash=False)


_unreachable: frozenset[Node] = frozenset()


def unreachable() -> frozenset[Node]:
    """The nodes that did not answer the last try, and that Ray still counts."""
    return _unreachable


def unreachable_hosts() -> set[str]:
    return {node.host for node in unreachable()}


@contextmanager
def watched() -> Iterator[None]:
    """Tries all nodes in the background. Needs a connection to Ray."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(ended,), name="network", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(ANSWERS_S + PERIOD_S)
        _note(frozenset())


def silent_nodes(nodes: Collection[Node], limit_s: float = ANSWERS_S) -> frozenset[Node]:
    """Those to whose port no connection came about within `limit_s`. A refusal is an answer."""
    if not nodes:
        return frozenset()
    with ThreadPoolExecutor(min(len(nodes), AT_ONCE)) as pool:
        answers = pool.map(lambda node: _answers(node, limit_s), nodes)
        return frozenset(node for node, answer in zip(nodes, answers, strict=True) if not answer)


def _watch(ended: threading.Event) -> None:
    while not ended.wait(PERIOD_S):
        with suppress(Exception):  # Ray does not answer: whether a node does cannot be known
            _note(silent_nodes(_nodes()))


def _nodes() -> list[Node]:
    import ray

    return [_node(each) for each in ray.nodes() if each["Alive"]]


def _node(found: Mapping[str, Any]) -> Node:
    address = found["NodeManagerAddress"]
    return Node(found["NodeManagerHostname"], address, found["NodeManagerPort"], found["Resources"])


def _answers(node: Node, limit_s: float) -> bool:
    try:
        with suppress(ConnectionRefusedError):  # somebody refused
            socket.create_connection((node.address, node.port), limit_s).close()
    except OSError:
        return False
    return True


def _note(found: frozenset[Node]) -> None:
    global _unreachable
    _unreachable = found
