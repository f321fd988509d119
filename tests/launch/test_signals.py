"""What a signal does, decided in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from launch import cli, signals


@pytest.fixture(autouse=True)
def _no_signal_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """For other tests in this process: the newest signal stays known after `handled`."""
    monkeypatch.setattr(signals, "_handler", signals.Handler())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """clock(seconds) sets the time."""
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_the_first_asks_and_the_second_interrupts(clock: Callable[[float], None]) -> None:
    asked: list[int] = []
    with signals.handled(), signals.gentle(asked.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [15] and signals.pending() == 15
        clock(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by torchrun: the same
        assert asked == [15]
        clock(2.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.interrupted_by() == 2


def test_where_no_stage_runs_the_first_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.handled():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not signals.pending()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_code_says_which_signal_it_was(number: signal.Signals) -> None:
    def command() -> int:
        with signals.handled():
            os.kill(os.getpid(), number)
        return 0

    assert cli._guarded(command) == 128 + number
