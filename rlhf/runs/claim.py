"""A run's folder has one driver at a time: a second one is refused, and workers of a driver that is gone stop writing.

`driver.json` names the driver, which touches it every few seconds. No lock of the file system is needed, because the
folder may be on shared storage: creating a file that must not exist yet is atomic there too.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from rlhf.errors import UserError

CLAIM = "driver.json"
BEAT_S = 5.0
STALE_S = 60.0  # without a beat
TRIES = 3


@dataclass(frozen=True)
class Owner:
    key: str  # random, new for every driver
    host: str
    place: str  # where `pid` is valid: one boot of one kernel, and one namespace of process ids
    pid: int
    started: float  # seconds since 1970, by which the process is told from a later one with its number

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {since}"


class TakenOver(UserError):
    """The folder has another driver now. Nothing may be written to it any more."""

    def __init__(self, message: str, exit_code: int = 6) -> None:
        super().__init__(message, exit_code)


class Follower:
    """Watches a claim: `lost()` says why it does not hold any more, "" while it does."""

    def __init__(self, path: Path, key: str, life: Path | None = None) -> None:
        """`life`: the file by which this process shows that it lives. It is wanted as long as that exists."""
        self.path, self.key, self._life = path, key, life
        self._beat, self._since = 0.0, time.monotonic()
        self._storage_answers, self._is_wanted = True, True

    def show_life(self) -> None:
        if self._life is None:
            return
        try:
            os.utime(self._life)
            self._storage_answers = True
        except FileNotFoundError:
            self._is_wanted = False
        except OSError:
            self._storage_answers = False

    def end_life(self) -> None:
        """Nobody waits for a sign of this process any more: it has ended its work."""
        if self._life is not None:
            with suppress(OSError):
                self._life.unlink()
            self._life = None

    def asking(self) -> list[Path]:
        """Where the driver asks this process to stop: first those of one attempt, last all of the run, who come first."""
        return ([] if self._life is None else [self._life.parent]) + [self.path.parent]

    def lost(self, now: float | None = None) -> str:
        """A driver that was not heard for `STALE_S` counts as gone, unless the storage cannot be written. No clock is
        compared with that of another host."""
        now = time.monotonic() if now is None else now
        if not self._is_wanted:
            return "its worker group was given up"
        owner, beat = _read(self.path)
        if owner is not None and owner.key != self.key:
            return f"{self.path.parent} was taken over by {owner}"
        if not self._storage_answers or (beat and beat != self._beat):
            self._beat, self._since = beat, now
        if now - self._since > STALE_S:
            return f"the driver of {self.path.parent} is gone: no sign of life for {now - self._since:.0f} s"
        return ""

    def is_wanted(self) -> bool:
        self.show_life()
        return not self.lost()

    def require(self) -> None:
        self.show_life()
        if reason := self.lost():
            raise TakenOver(f"stopped: {reason}")


_storage_fault = ""
_followed: dict[Path, Follower] = {}  # by the folder of the run; only the driver of a sweep works for several


def follow(folder: Path, key: str, life: Path | None = None) -> None:
    """From now on `require` is also about the driver of `folder` with this key, and this process shows in `life` that it
    lives."""
    _followed[folder] = Follower(folder / CLAIM, key, life)


def followed(folder: Path) -> Follower | None:
    """None outside of runs, for instance in a notebook."""
    return _followed.get(folder)


def require() -> None:
    """TakenOver (6) if a run that this process works for has lost its driver or has another one."""
    for follower in list(_followed.values()):
        follower.require()


@contextmanager
def hold(folder: Path) -> Iterator[str]:
    """Makes this process the driver of `folder` and gives the key of its claim. UserError (2) if there is another."""
    is_new = not folder.exists()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what models were trained on may be private
    path, own = folder / CLAIM, _this_process()
    _take(path, own)
    follow(folder, own.key)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, own.key, ended), name="claim", daemon=True).start()
    try:
        yield own.key
    finally:
        ended.set()
        _followed.pop(folder, None)
        owner, _ = _read(path)
        if owner is not None and owner.key == own.key:
            path.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # it holds something: the run got as far as that
                folder.rmdir()


def storage_fault() -> str:
    """Why the driver cannot write to the folder just now, "" if it can."""
    return _storage_fault


def _beat(path: Path, key: str, ended: threading.Event) -> None:
    global _storage_fault
    while not ended.wait(BEAT_S):
        owner, _ = _read(path)
        if owner is None or owner.key != key:
            continue
        try:
            os.utime(path)
            _storage_fault = ""
        except OSError as error:  # it may be back in a while
            _storage_fault = error.strerror or type(error).__name__


def _take(path: Path, own: Owner) -> None:
    for _ in range(TRIES):
        try:
            with path.open("x") as stream:
                json.dump(asdict(own), stream)
            return
        except FileExistsError:
            other, beat = _read(path)
            if beat and not _is_stale(other, _now(path) - beat):
                raise _refusal(path.parent, other) from None
            _remove(path, other)
    raise _refusal(path.parent, _read(path)[0])


def _is_stale(owner: Owner | None, age_s: float) -> bool:
    if owner is not None and owner.place == place_of_pids():
        return not is_alive(owner.pid, owner.started)
    return age_s > STALE_S


def _remove(path: Path, stale: Owner | None) -> None:
    """Removes the claim of `stale`, and not that of another driver which was quicker."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside)[0] != stale:
        aside.rename(path)
    aside.unlink(missing_ok=True)


def _refusal(folder: Path, owner: Owner | None) -> UserError:
    return UserError(
        f"{folder} has a driver already: {owner or 'one that is just starting'}. Wait until it has ended or end it, or "
        "give this run another name (--name). A driver that is gone is replaced: at once on its own host, elsewhere "
        f"after {STALE_S:.0f} s."
    )


def _read(path: Path) -> tuple[Owner | None, float]:
    """Who holds the claim, and when it was last touched by the clock of the storage; 0 if that is not known."""
    try:
        with path.open("rb") as stream:  # opened anew, because network file systems then ask the server
            beat, content = os.fstat(stream.fileno()).st_mtime, stream.read()
    except OSError:
        return None, 0.0
    try:
        values = json.loads(content)
        return Owner(**{field.name: values[field.name] for field in fields(Owner)}), beat
    except (ValueError, KeyError, TypeError):
        return None, beat


def _now(path: Path) -> float:
    """The time by the clock of the storage."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _this_process() -> Owner:
    pid = os.getpid()
    return Owner(secrets.token_hex(16), socket.gethostname(), place_of_pids(), pid, psutil.Process(pid).create_time())


def place_of_pids() -> str:
    """One boot of one kernel, and one namespace of process ids."""
    parts = [socket.gethostname(), f"{psutil.boot_time():.0f}"]
    with suppress(OSError):  # Linux only
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def is_alive(pid: int, started: float) -> bool:
    """Whether the process that started then still runs on this host."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
