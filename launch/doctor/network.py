"""All-reduce between every two nodes and all together: which of them cannot talk, and how fast the others are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

from launch.doctor.result import CheckResult, ok

FLOATS = 1_000_000
SLOW_ROUND_S = 0.05
SLOW_RATE = 20e6  # bytes per second

Timing = tuple[float, float]
"""Seconds of a round trip with one number, bytes per second with many."""


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Every pair of nodes once, in as few rounds as possible in each of which a node has one partner."""
    circle: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        pairs = [(circle[i], circle[-1 - i]) for i in range(len(circle) // 2)]
        found.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def all_reduce(address: tuple[str, int], session: str, rank: int, size: int, on_gpu: bool, timeout_s: float) -> Timing:
    """Meets the other ranks of `session` at a store. RuntimeError where they cannot talk within `timeout_s`."""
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(session, dist.TCPStore(*address, is_master=False, timeout=limit))
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    group: Any
    if on_gpu:
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        group = dist.ProcessGroupNCCL(store, rank, size, options)
    else:
        group = dist.ProcessGroupGloo(store, rank, size, limit)

    def seconds(count: int, times: int) -> float:
        taken = []
        for _ in range(times + 1):  # the first one connects
            tensor = torch.ones(count, device=device)
            began = time.monotonic()
            group.allreduce([tensor]).wait()
            if float(tensor[-1]) != size:
                raise RuntimeError(f"the sum of {size} ones is {float(tensor[-1])}")
            taken.append(time.monotonic() - began)
        return median(taken[1:])

    return seconds(1, 5), 4 * FLOATS / seconds(FLOATS, 2)


def judge(pairs: Mapping[tuple[str, str], Timing | str], together: Timing | str | None) -> Iterator[CheckResult]:
    """Of every pair its timing, or why there is none. `together`: of all nodes; None where it was not tried."""
    broken = [(names, found) for names, found in pairs.items() if isinstance(found, str)]
    for (one, other), text in broken:
        remedy = "open all ports between the nodes, and name the interface that joins them (GLOO_/NCCL_SOCKET_IFNAME)"
        yield CheckResult("network", f"{one} and {other}", "failed", f"they cannot talk: {text}", remedy)
    slow = {names: found for names, found in pairs.items() if not isinstance(found, str) and is_slow(found)}
    for (one, other), timing in slow.items():
        remedy = "look at cable, switch and interface; every step of ZeRO-3 waits for this pair"
        yield CheckResult("network", f"{one} and {other}", "warning", f"{shown(timing)}", remedy)
    good = [found for found in pairs.values() if not isinstance(found, str) and not is_slow(found)]
    if good and not broken and not slow:
        worst = max(one[0] for one in good), min(one[1] for one in good)
        yield ok("network", f"{len(good)} pairs of nodes, {shown(worst)} or better")
    if isinstance(together, str):
        text = f"every pair can talk, but not all together: {together}"
        yield CheckResult("network", "all nodes", "failed", text, "look for a limit on connections, or for a firewall")
    elif together is not None:
        yield ok("network", shown(together), "all nodes")


def is_slow(timing: Timing) -> bool:
    return timing[0] > SLOW_ROUND_S or timing[1] < SLOW_RATE


def shown(timing: Timing) -> str:
    return f"all-reduce of one number in {timing[0] * 1e3:.1f} ms, of 4 MB at {timing[1] / 1e6:.0f} MB/s"
