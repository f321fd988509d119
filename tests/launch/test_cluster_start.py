"""A private Ray where the machine is busy, and where the path of the temporary folder is long."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from launch import connection
from rlhf.errors import UserError

TIMEOUT = Exception("The current node timed out during startup. This could happen because some of the raylet failed")


def starts(failures: list[Exception]) -> tuple[int, int]:
    """How often Ray was started and cleared away, where the first starts fail."""
    left, calls = list(failures), []

    def init() -> None:
        calls.append("init")
        if left:
            raise left.pop(0)

    connection.start(init, lambda: calls.append("shutdown"))
    return calls.count("init"), calls.count("shutdown")


def test_a_start_that_was_too_slow_is_made_again() -> None:
    assert starts([]) == (1, 0)
    assert starts([TIMEOUT, TIMEOUT]) == (3, 2)


def test_a_machine_that_stays_too_busy_is_named_as_the_reason() -> None:
    with pytest.raises(UserError, match="too busy. Wait until") as caught:
        starts([TIMEOUT] * 9)
    assert caught.value.exit_code == 5


def test_another_fault_is_not_tried_again() -> None:
    with pytest.raises(ValueError, match="no such cluster"):
        starts([ValueError("no such cluster")])


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_folder_gives_way_to_a_short_one_of_its_own(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(connection.tempfile, "tempdir", None)
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv(variable, str(long))
    with connection.short_folder() as folder:
        assert folder is not None and stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        sockets = Path(folder, "session_2026-11-28_03-26-19_123456_4194304", "sockets")
        sockets.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(sockets / "plasma_store"))  # OSError where the path is too long
    assert not Path(folder).exists()
    said = capsys.readouterr().err
    assert said.count("too long") == 1 and "RAY_TMPDIR" in said


def test_a_short_folder_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with connection.short_folder() as folder:
        assert folder is None
    assert capsys.readouterr().err == ""


def test_where_no_short_folder_can_be_made_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 90)
    monkeypatch.setattr(connection.tempfile, "mkdtemp", fail)
    with pytest.raises(UserError, match="set RAY_TMPDIR") as caught, connection.short_folder():
        pass
    assert caught.value.exit_code == 5
