"""A bug as a text that stands in the program, and the text to plant in its place."""

from __future__ import annotations

from dataclasses import dataclass

Entry = tuple[str, str, str] | tuple[str, str, str, str]


@dataclass(frozen=True)
class Bug:
    name: str  # what is wrong with the program that has it
    file: str
    text: str  # stands in the file exactly once
    planted: str  # stands there instead
    tests: tuple[str, ...]  # files, or file::test, of which one must fail
    harmless: str  # for what is no bug: why it changes nothing; then every test must pass


def bugs_in(file: str, tests: list[str], *entries: Entry) -> list[Bug]:
    """Entries are (name, text, planted) or, for what is no bug, (name, text, planted, why it changes nothing).

    `tests` are paths below tests/.
    """
    where = tuple(f"tests/{test}" for test in tests)
    return [
        Bug(name, file, text, planted, where, harmless=reason[0] if reason else "")
        for name, text, planted, *reason in entries
    ]
