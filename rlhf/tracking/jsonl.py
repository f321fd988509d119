"""Append-only JSONL files. A line that a killed process left half-written is never read."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.runs.artifacts import plain
from rlhf.runs.storage import patiently


class Lines:
    """Writes one JSON object with its time (seconds since 1970) per line; another process sees each line at once.

    `hold`: with a lock on the file, where there are locks, until it is closed or the process ends in any way.
    """

    def __init__(self, path: Path, hold: bool = False) -> None:
        self._path = path
        self._stream = path.open("a", encoding="utf-8")
        if hold:
            with suppress(OSError):
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _ends_within_a_line(path):
            self._stream.write("\n")
            self._stream.flush()

    def append(self, values: Mapping[str, Any]) -> None:
        """Numbers that are not finite become null. Raises UserError(5) when the disk is full."""
        line = json.dumps(plain({"time": round(time.time(), 3), **values}), ensure_ascii=False, allow_nan=False)
        try:
            self._stream.write(line + "\n")
            patiently(self._stream.flush, self._path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"The disk is full: {self._path} could not be written. Free some space.", 5) from None

    def close(self) -> None:
        self._stream.close()


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete lines from byte `start` on, each with its end offset. Nothing if there is no file."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        stream.seek(start)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            with suppress(ValueError):
                yield json.loads(line), start


def is_free(path: Path) -> bool:
    """Whether no process holds the lock of `path`. False where the file system has no locks: nobody can tell then."""
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 1, 0))
        return size > 0 and stream.read(1) != b"\n"
