"""Rows of a CSV file: separated by commas, semicolons or tabs, with numbers and lists in their columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from reward_data.errors import DataError
from reward_data.rows import MOST_CHARACTERS, Row

DELIMITERS = (",", "\t", ";", "|")
# Columns of the known forms that hold numbers, and those that hold lists. Any other cell is text, even "42".
NUMBERS = frozenset(
    [
        "strength",
        "preference_strength",
        "overall_preference",
        "score_chosen",
        "score_rejected",
        "helpfulness",
        "annotator1",
        "annotator2",
        "annotator3",
        "better_response_id",
        "safer_response_id",
        "labels",
        "score_0",
        "score_1",
    ]
)
LISTS = frozenset(
    [
        "history",
        "messages",
        "conversations",
        "conversation",
        "context",
        "answers",
        "completions",
        "instances",
        "question",
    ]
)
SIDES = frozenset(("prompt", "chosen", "rejected", "output"))  # text, or a dialogue written as JSON


def csv_rows(file: Path, lines: Iterator[str]) -> Iterator[Row]:
    """The rows of lines that keep their ends."""
    csv.field_size_limit(MOST_CHARACTERS)  # answers may be longer than the module's 128 KiB
    first = next(lines, "")
    skipped = first.lower().startswith("sep=")  # a line for spreadsheets
    delimiter = first[4] if skipped else _delimiter(first)
    reader = csv.reader(lines if skipped else chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"{file}:{reader.line_num + 1 + skipped}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(f"{place}: a quotation mark opens here that nothing closes") from None
            yield Row(None, place, f"not CSV: {error}")
            continue
        if cells is None:
            return
        if cells and not header:
            header = _header(cells, place)
        elif cells:
            fault = "" if len(cells) == len(header) else f"{len(cells)} cells, but the header names {len(header)}"
            yield Row({k: _cell(k, cell) for k, cell in zip(header, cells, strict=False)}, place, fault)


def _delimiter(header: str) -> str:
    """The delimiter that gives the header most columns; the comma if several do."""
    return max(DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"{place}: two columns are called {name!r}; rename one")
    return names


def _cell(column: str, cell: str) -> Any:
    if column in NUMBERS:
        return _number(cell)
    if column in LISTS | SIDES and cell.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        return value if column in LISTS or _is_dialogue(value) else cell
    return None if column == "history" and not cell.strip() else cell


def _number(cell: str) -> Any:
    """The number in the cell; None for an empty cell, and the text itself if it is not a number."""
    if not cell.strip():
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _is_dialogue(value: Any) -> bool:
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns)
