"""Storage that is away for a while, or full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs import storage
from rlhf.runs.artifacts import write_json
from rlhf.tracking import jsonl


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[seconds since the test began]: waiting takes no time."""
    now = [100.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.mark.parametrize("number", [errno.EROFS, errno.ESTALE, errno.EIO])
def test_a_small_write_waits_for_storage_that_is_away_and_says_so_once(
    number: int, clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_(path: Path, *arguments: Any) -> Any:
        if clock[0] < 150:
            raise OSError(number, os.strerror(number))
        return original(path, *arguments)

    original = Path.open
    monkeypatch.setattr(Path, "open", open_)
    write_json(tmp_path / "state.json", {"a": 1})
    monkeypatch.undo()
    assert (tmp_path / "state.json").read_text() == '{\n "a": 1\n}\n'
    said = capsys.readouterr().err
    assert said.count("warning: waits for the storage of") == 1 and os.strerror(number) in said


def test_it_does_not_wait_for_ever(clock: list[float]) -> None:
    def write() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(OSError, match="Read-only"):
        storage.patiently(write, Path("metrics.jsonl"))
    assert 220 <= clock[0] <= 223


def test_another_error_is_raised_at_once(clock: list[float]) -> None:
    def write() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        storage.patiently(write, Path("metrics.jsonl"))
    assert clock[0] == 100.0


def test_a_line_that_had_to_wait_is_written_once(tmp_path: Path, clock: list[float]) -> None:
    lines = jsonl.Lines(tmp_path / "metrics.jsonl")
    stream = lines._stream

    class Away:
        def __getattr__(self, name: str) -> object:
            return getattr(stream, name)

        def flush(self) -> None:
            if clock[0] < 110:
                raise OSError(errno.EROFS, "Read-only file system")
            stream.flush()

    lines._stream = Away()  # type: ignore[assignment]
    lines.append({"step": 1})
    lines.close()
    assert [line["step"] for line, _ in jsonl.read_lines(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EROFS, "Read-only file system"), False),
    ],
)
def test_a_full_disk_is_recognised_through_a_library(error: Exception, full: bool) -> None:
    assert storage.is_full(error) == full
