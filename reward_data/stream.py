"""Rows of a path a chunk at a time, so that a file of JSON lines is never whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from reward_data import files, folders
from reward_data.converters import converter_for, form_of
from reward_data.errors import BadRow, DataError
from reward_data.json_rows import line_row
from reward_data.load import SHIPPED, Table, records_of_table
from reward_data.records import Kind, Record
from reward_data.rows import MOST_CHARACTERS, Row

CHUNK = 1000
LINES = (".jsonl", ".ndjson")
TOO_MANY_BYTES = 4 * MOST_CHARACTERS + 4  # in UTF-8 a character has at most 4


def files_of(path: str | Path) -> list[Path]:
    """The files behind a file, a folder, or `shipped` (its held-out preferences). DataError where there are none."""
    if str(path) == "shipped":
        return [SHIPPED / "preferences.held_out.jsonl"]
    source = folders.find(path)
    if source.hub:
        raise DataError(f"{path}: there is no such file or folder")
    return list(source.files)


def row_chunks(file: Path, size: int = CHUNK) -> Iterator[list[Row]]:
    """The rows of one file, `size` at a time. Only a file of JSON lines is read as they are asked for."""
    rows = _lines(file) if _has_lines(file) else files.read_rows(file)
    while chunk := list(islice(rows, size)):
        yield chunk


def joins_rows(first: list[Row]) -> bool:
    """Whether the form makes records of several rows, which may stand anywhere in the file."""
    return hasattr(converter_for("auto", form_of(first)), "group")


def records_of(kind: Kind, first: list[Row], rows: list[Row]) -> tuple[list[Record], list[BadRow]]:
    """The records of `rows` in the form that the file's `first` rows show, and the rows that cannot be used."""
    refused: list[BadRow] = []
    table = Table(form_of(first), rows)
    return list(records_of_table(kind, table, "auto", "helpful", refused)), refused


def _has_lines(file: Path) -> bool:
    """Whether every line is a row by itself, as far as the first one tells."""
    if file.is_dir() or file.suffix.lower() not in LINES:
        return False
    with file.open("rb") as stream:
        first = next((line for line in iter(partial(_line, stream), b"") if line.strip()), b"")
    try:
        return first.lstrip().startswith(b"{") and not line_row(first.decode(), "").fault
    except UnicodeDecodeError:
        return False


def _line(stream: BinaryIO) -> bytes:
    """The next line; of one that is too long as much as tells so, because all of it may not fit into memory."""
    line = more = stream.readline(TOO_MANY_BYTES)
    while len(more) == TOO_MANY_BYTES and not more.endswith(b"\n"):
        more = stream.readline(TOO_MANY_BYTES)
    return line if line is more else line.decode(errors="ignore").encode()


def _lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(iter(partial(_line, stream), b""), 1):
            text = line.decode(errors="surrogateescape")
            if text.strip():
                yield line_row(text, f"{file}:{number}")
