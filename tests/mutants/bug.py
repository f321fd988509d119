"""A bug as a place in the program's syntax tree, and what to plant there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.pattern import CannotPlant, replace

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    name: str  # what is wrong with the program that has it
    where: str  # the qualified name of a function or class, "" for what stands outside of them
    pattern: str  # what to find there, as `pattern.py` reads it
    planted: str  # what to put in its place; "" leaves it out
    nth: int | None = None  # which piece with this pattern, from 0; None: there is one
    given: str = ""  # another piece, that tells what the letters of `planted` stand for
    harmless: str = ""  # for what is no bug: why it changes nothing; then every test must pass
    file: str = ""
    tests: tuple[str, ...] = ()  # files, or file::test, of which one must fail

    def plant(self, source: str) -> str:
        """The program with the bug."""
        try:
            planted = replace(source, self.where, self.pattern, self.planted, self.nth, self.given)
            compile(planted, self.file, "exec")
        except (CannotPlant, SyntaxError) as error:
            raise CannotPlant(f"{self.file}: {self.name}: {error}") from None
        return planted


def bugs_in(file: str, tests: list[str], *bugs: Bug) -> list[Bug]:
    """The bugs of one file. `tests` are paths below tests/."""
    where = tuple(f"tests/{test}" for test in tests)
    return [dataclasses.replace(bug, file=file, tests=where) for bug in bugs]
