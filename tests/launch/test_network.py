"""Which nodes the driver reaches: real sockets in place of the nodes' Ray."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from launch import network, worker_group
from launch.network import Node, silent_nodes


def node_at(name: str, taken: socket.socket) -> Node:
    address, port = taken.getsockname()
    return Node(name, address, port, {"CPU": 4.0, "object_store_memory": 1e9})


@pytest.fixture
def deaf() -> Iterator[socket.socket]:
    """Its queue is full, so the kernel drops what comes, as a cut cable does."""
    waiting = []
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(server.getsockname())
            waiting.append(one)
        yield server
        for one in waiting:
            one.close()


def test_a_node_that_lets_connections_wait_is_silent_and_a_refusal_is_an_answer(deaf: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hearing, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        nodes = [node_at("hears", hearing), node_at("is deaf", deaf), node_at("refuses", closed)]
        assert {node.host for node in silent_nodes(nodes, 0.3)} == {"is deaf"}
    assert silent_nodes([]) == frozenset()


def test_nodes_that_do_not_answer_are_watched_until_they_do(
    deaf: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node_at("two", deaf)]
    monkeypatch.setattr(network, "_nodes", lambda: nodes)
    monkeypatch.setattr(network, "PERIOD_S", 0.01)
    monkeypatch.setattr(network, "ANSWERS_S", 0.05)
    tries = []
    monkeypatch.setattr(network, "silent_nodes", lambda found: tries.append(1) or silent_nodes(found, 0.05))
    with network.watched():
        _until(lambda: {node.host for node in network.unreachable()} == {"two"})
        nodes.clear()  # Ray has given it up
        _until(lambda: not network.unreachable())
        nodes.append(node_at("two", deaf))
        _until(lambda: bool(network.unreachable()))
    assert network.unreachable() == frozenset()
    seen = len(tries)
    time.sleep(0.1)
    assert len(tries) == seen  # nobody tries any more


def test_what_lies_on_unreachable_nodes_does_not_count_as_room(
    deaf: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 12.0})
    assert worker_group.cluster_resources() == {"CPU": 12.0, "GPU": 0.0}
    monkeypatch.setattr(network, "_unreachable", frozenset([node_at("two", deaf)]))
    assert worker_group.cluster_resources() == {"CPU": 8.0, "GPU": 0.0}


def _until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about within 4 s")
