"""Plants every bug of the tables, one at a time, and tells which test fails: `make mutants`.

    python -m tests.mutants.run             all
    python -m tests.mutants.run losses      those with `losses` in their name or file

First every bug is planted once without a run: a table that no longer fits the program, its tests or docs/correctness.md
stops the runner with a line for each bug. The libraries are imported once, here. Every bug then gets a process forked
from this one and a copy of its package in which the bug is planted; the copy comes first on the path, also on that of
processes that a test starts. Before them all tests run without a bug. A bug is killed when a test fails; a program that
cannot be imported or does not know one of its names is no bug, and a test that finds no end has not found the bug.

Exit status 0 if all tests pass without a bug, every bug is killed and what is called harmless passes, else 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants.bug import ROOT, Bug
from tests.mutants.bugs import BUGS
from tests.mutants.check import misfits, wrong_on_the_page

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LIBRARIES = ("torch", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2", "peft")
NO_PROGRAM = {"ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError", "SyntaxError"}
LIMIT = 600.0  # seconds for the tests of one bug; the slowest start two ranks of DeepSpeed


class Outcome(NamedTuple):
    test: str  # the first that failed, "" if all passed
    trouble: str  # why there is nothing to tell, "" if there is
    seconds: float
    log: str = ""  # the end of what pytest printed

    def fault(self, bug: Bug) -> str:
        """What is not as it should be; "" where all is well."""
        if self.trouble or bug.harmless:
            return self.trouble or (f"called harmless, and {self.test} fails" if self.test else "")
        return "" if self.test else "no test fails"


# --- planting -------------------------------------------------------------------------------------------------------


def plant(bug: Bug, folder: Path) -> None:
    """A copy of the bug's package in `folder`, with the bug."""
    package = bug.file.split("/")[0]
    shutil.copytree(ROOT / package, folder / package)
    place = folder / bug.file
    place.write_text(bug.plant(place.read_text(encoding="utf-8")), encoding="utf-8")


# --- one process ----------------------------------------------------------------------------------------------------


class FirstFailure:
    """A pytest plugin."""

    test = error = ""

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        if not self.test:
            self.test, self.error = node.nodeid, call.excinfo.typename


def run_tests(tests: Sequence[str], bug: Bug | None, folder: Path) -> None:
    """In a process of its own: runs the tests until one fails, and leaves `found.json` in `folder`."""
    os.setsid()  # what the tests start goes down with them
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and with a runner that is killed: a bug may have no end
    log = os.open(folder / "log", os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if bug:
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        spec = importlib.util.find_spec(bug.file.split("/")[0])
        assert spec and spec.origin and Path(spec.origin).is_relative_to(folder), "the bug would not be imported"
    first = FirstFailure()
    options = ["-x", "--hypothesis-profile=first", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}"]
    code = pytest.main([*options, "-o", "timeout=0", *(str(ROOT / test) for test in tests)], plugins=[first])
    found = {"code": int(code), "test": first.test, "error": first.error}
    (folder / "found.json").write_text(json.dumps(found))


def outcome(folder: Path, seconds: float) -> Outcome:
    """What a process that has ended left."""
    log = (folder / "log").read_text(errors="replace")[-4000:]
    if not (folder / "found.json").exists():
        return Outcome("", "the process died", seconds, log)
    code, test, error = json.loads((folder / "found.json").read_text()).values()
    if error in NO_PROGRAM:
        return Outcome("", f"{error} in {test}", seconds, log)
    if code not in (0, 1):
        return Outcome("", f"pytest ended with {code} at {test or 'no test'} ({error or 'no error'})", seconds, log)
    return Outcome(test.rpartition("/")[2], "", seconds, log)


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """The tests of a bug, or without one."""

    tests: Sequence[str]
    bug: Bug | None = None

    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        (self.folder / "log").touch()
        if self.bug:
            plant(self.bug, self.folder)
        self.process: BaseProcess = get_context("fork").Process(
            target=run_tests, args=(self.tests, self.bug, self.folder)
        )
        self.started = time.perf_counter()
        self.process.start()

    def poll(self, limit: float) -> Outcome | None:
        """None while it runs."""
        seconds = time.perf_counter() - self.started
        if self.process.is_alive() and seconds < limit:
            return None
        found = (
            Outcome("", f"no end in {limit:.0f} s", seconds)
            if self.process.is_alive()
            else outcome(self.folder, seconds)
        )
        self.stop()
        return found

    def stop(self) -> None:
        assert self.process.pid
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def run(jobs: Sequence[Job], limit: float, progress: Progress, title: str) -> Iterator[tuple[Job, Outcome]]:
    """Each job with its outcome as it ends; as many at a time as there are cores."""
    waiting, running = deque(jobs), []
    task = progress.add_task(title, total=len(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                running.append(waiting.popleft())
                running[-1].start()
            for job in list(running):
                if found := job.poll(limit):
                    running.remove(job)
                    progress.advance(task)
                    yield job, found
            progress.refresh()
            time.sleep(0.05)
    finally:
        for job in running:
            job.stop()


def by_file(bugs: Sequence[Bug]) -> list[Job]:
    """All tests that the bugs name, without a bug."""
    files: dict[str, set[str]] = {}
    for test in {test for bug in bugs for test in bug.tests}:
        files.setdefault(test.partition("::")[0], set()).add(test)
    return [Job([file] if file in tests else sorted(tests)) for file, tests in sorted(files.items())]


def prepare() -> None:
    """All that the processes share; no threads, which a fork would lose."""
    importlib.import_module("tests.conftest")  # its environment, before a library reads it
    import torch

    torch.set_num_threads(1)
    for library in LIBRARIES:
        importlib.import_module(library)
    # A failure is enough; its smallest example is for people.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("first", deadline=None, derandomize=True, phases=phases)


def main(bugs: Sequence[Bug], limit: float = LIMIT) -> int:
    console = Console(highlight=False, soft_wrap=True)
    if complaints := misfits(bugs):
        console.print("\n".join(complaints), markup=False)
        return 1
    started = time.perf_counter()
    prepare()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: dict[Bug, Outcome] = {}
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        for job, result in run(by_file(bugs), LIMIT, progress, "tests without a bug"):
            if result.test or result.trouble:
                why = result.test or result.trouble
                console.print(f"{result.log}\nwithout any bug: {why} ({job.tests[0]})", markup=False)
                return 1
        for job, result in run([Job(bug.tests, bug) for bug in bugs], limit, progress, "bugs"):
            assert job.bug
            found[job.bug] = result
            console.print(line(job.bug, result), markup=False)
    return summary([(bug, found[bug]) for bug in bugs], time.perf_counter() - started, console)


def line(bug: Bug, result: Outcome) -> str:
    fault = result.fault(bug)
    verdict = "FAULT" if fault else "harmless" if bug.harmless else "killed"
    why = fault or bug.harmless or result.test.replace("::", " ")
    return f"{verdict:8} {result.seconds:5.1f} s  {bug.file:32} {bug.name:58} {why}"


def summary(found: Sequence[tuple[Bug, Outcome]], seconds: float, console: Console) -> int:
    faults = [(bug, result) for bug, result in found if result.fault(bug)]
    planted = [result for bug, result in found if not bug.harmless]
    killed = sum(bool(result.test) for result in planted)
    harmless = len(found) - len(planted)
    for bug, result in faults:
        console.print(f"{result.log}\n{bug.file}: {bug.name}: {result.fault(bug)}", markup=False)
    share = 100 * killed / max(len(planted), 1)
    console.print(
        f"{killed} of {len(planted)} bugs killed ({share:.1f} %), {harmless} harmless changes, {seconds:.0f} s",
        markup=False,
    )
    return 1 if faults else 0


def chosen(words: Sequence[str]) -> list[Bug]:
    return [bug for bug in BUGS if not words or any(word in f"{bug.file}: {bug.name}" for word in words)]


if __name__ == "__main__":
    if wrong := wrong_on_the_page(BUGS, (ROOT / "docs/correctness.md").read_text(encoding="utf-8")):
        sys.exit("\n".join(wrong))
    sys.exit(main(chosen(sys.argv[1:])))
