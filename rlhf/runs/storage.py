"""Storage that is away for a while: small writes wait for it, because a stage has more to lose than some seconds."""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

AWAY = {errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
LIMIT_S, RETRY_S = 120.0, 1.0
FULL = re.compile(r"No space left on device|Disk quota exceeded|disk is full", re.IGNORECASE)


def patiently(write: Callable[[], Value], path: Path) -> Value:
    """Repeats `write` while the storage of `path` is read-only or does not answer, and says so once."""
    since = 0.0
    while True:
        try:
            return write()
        except OSError as error:
            now = time.monotonic()
            if error.errno not in AWAY or (since and now - since > LIMIT_S):
                raise
            if not since:
                since = now
                clock = time.strftime("%H:%M:%S")
                text = f"waits for the storage of {path} ({error.strerror}), since {clock}, {LIMIT_S:.0f} s at most"
                print(f"warning: {text}", file=sys.stderr, flush=True)
        time.sleep(RETRY_S)


def is_full(error: BaseException | str) -> bool:
    """Whether a disk was full, also where a library has wrapped the error of the system."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or FULL.search(str(error)) is not None
