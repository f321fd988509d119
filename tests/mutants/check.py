"""Whether the tables of bugs fit the program, its tests and the page that names some of them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.bug import ROOT, Bug
from tests.mutants.pattern import CannotPlant


def misfits(bugs: Sequence[Bug], root: Path = ROOT) -> list[str]:
    """What keeps these bugs from being planted and found, one line each."""
    return [*cannot_plant(bugs, root), *missing_tests(bugs, root)]


def cannot_plant(bugs: Sequence[Bug], root: Path) -> list[str]:
    """Bugs whose place is gone, and those that are another one under a second name."""
    complaints = []
    seen: dict[tuple[str, str], Bug] = {}
    for bug in bugs:
        if not (root / bug.file).is_file():
            complaints.append(f"{bug.file}: {bug.name}: there is no such file")
            continue
        try:
            planted = bug.plant((root / bug.file).read_text(encoding="utf-8"))
        except CannotPlant as error:
            complaints.append(str(error))
            continue
        first = seen.setdefault((bug.file, planted), bug)
        if first is not bug:
            complaints.append(f"{bug.file}: {bug.name}: the same program as: {first.name}")
    return complaints


def missing_tests(bugs: Sequence[Bug], root: Path) -> list[str]:
    complaints = []
    for test in sorted({test for bug in bugs for test in bug.tests}):
        file, _, name = test.partition("::")
        tree = ast.parse((root / file).read_text(encoding="utf-8")) if (root / file).is_file() else ast.Module([], [])
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
        if not names or (name and name not in names):
            complaints.append(f"{test}: there is no such test")
    return complaints


def rows_of_the_page(page: str, heading: str) -> list[list[str]]:
    """The table with this first row."""
    lines = page.splitlines()
    start = lines.index(heading) + 2
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def wrong_on_the_page(bugs: Sequence[Bug], page: str) -> list[str]:
    """Bugs that docs/correctness.md names and nobody plants, and harmless changes that it does not list as they are."""
    planted = {bug.name for bug in bugs if not bug.harmless}
    rows = rows_of_the_page(page, "| bug | seen in | planted as |")
    named = {name for _, _, names in rows for name in names.split("; ")}
    complaints = [f"docs/correctness.md: nobody plants: {name}" for name in sorted(named - planted)]
    told = rows_of_the_page(page, "| change | why it changes nothing |")
    if sorted(told) != sorted([f"`{bug.file}`: {bug.name}", bug.harmless] for bug in bugs if bug.harmless):
        complaints.append("docs/correctness.md: its harmless changes are not those of the tables")
    return complaints


def main() -> str | None:
    """`python -m tests.mutants.check`: what no longer fits, a line each, in seconds and without running a test."""
    from tests.mutants.bugs import BUGS

    page = (ROOT / "docs/correctness.md").read_text(encoding="utf-8")
    return "\n".join([*misfits(BUGS), *wrong_on_the_page(BUGS, page)]) or None


if __name__ == "__main__":
    sys.exit(main())
