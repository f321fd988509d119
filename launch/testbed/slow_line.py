"""A slow cable with losses: hands every frame of one interface to another one, later or never, and back.

The same as `tc netem`, which many kernels are built without. `python slow_line.py A B DELAY_S LOSS`
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, EVERY_PROTOCOL = 263, 15, 23, 3
LARGEST = 1 << 17


def open_interface(name: str) -> socket.socket:
    """Reads and writes whole frames with the notes of the kernel on them: missing checksums, frames to be cut."""
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    end.bind((name, EVERY_PROTOCOL))
    return end


def relay(first: str, second: str, delay_s: float, loss: float) -> None:
    """Until one of the interfaces is removed. `delay_s` is that of one direction."""
    ends = open_interface(first), open_interface(second)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    chance = random.Random(0)
    print("ready", flush=True)
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, (), (), timeout)[0]:
            frame = end.recv(LARGEST)
            if chance.random() >= loss:
                waiting.append((time.monotonic() + delay_s, other[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, frame = waiting.popleft()
            end.send(frame)


if __name__ == "__main__":
    relay(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
