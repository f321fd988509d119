"""Rows of a path a chunk at a time, so that a large file is never whole in memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from reward_data import files, folders
from reward_data.converters import converter_for, form_of
from reward_data.csv_rows import csv_rows
from reward_data.errors import BadRow, DataError
from reward_data.json_rows import line_row
from reward_data.load import SHIPPED, Table, records_of_table
from reward_data.records import Kind, Record
from reward_data.rows import MOST_CHARACTERS, Row

CHUNK = 1000
BATCH = 100  # rows of a Parquet file that are unpacked at once
LINES = (".jsonl", ".ndjson")
TOO_MANY_BYTES = 4 * MOST_CHARACTERS + 4  # in UTF-8 a character has at most 4


def _open_zst(file: Path) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd"))  # type: ignore[arg-type]


UNPACK: dict[str, Callable[..., Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zst,
}


def files_of(path: str | Path) -> list[Path]:
    """The files behind a file, a folder, or `shipped` (its held-out preferences). DataError where there are none."""
    if str(path) == "shipped":
        return [SHIPPED / "preferences.held_out.jsonl"]
    source = folders.find(path)
    if source.hub:
        raise DataError(f"{path}: there is no such file or folder")
    return list(source.files)


def row_chunks(file: Path, size: int = CHUNK) -> Iterator[list[Row]]:
    """The rows of one file, `size` at a time. JSON lines, CSV and Parquet are read as they are asked for, other forms at
    once.
    """
    rows = _rows(file)
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


def _rows(file: Path) -> Iterator[Row]:
    """What is not plainly of a form that streams is read whole, which also tells what is wrong with it."""
    if not file.is_dir() and file.suffix.lower() == ".parquet":
        return _parquet(file)
    head = b"" if file.is_dir() else _first_line(file)
    if _is_text(head) and files.is_csv(file):
        return csv_rows(file, _csv_lines(file))
    return _lines(file) if _is_row(file, head) else files.read_rows(file)


def _first_line(file: Path) -> bytes:
    """The first line that is not blank; empty if there is none near the beginning, or the file cannot be read."""
    try:
        with _opened(file) as stream:
            lines = islice(iter(partial(stream.readline, TOO_MANY_BYTES), b""), CHUNK)
            return next((line for line in lines if line.strip()), b"")
    except (DataError, OSError):
        return b""


def _is_text(head: bytes) -> bool:
    """UTF-8 without a mark, and no pointer to a file that is elsewhere."""
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return False
    return bool(head) and "\0" not in text and not text.startswith("\ufeff") and not head.startswith(files.LFS_HEADER)


def _is_row(file: Path, head: bytes) -> bool:
    """Whether every line is a row by itself, as far as the first one tells."""
    named = file.name.lower().removesuffix(file.suffix.lower()) if file.suffix.lower() in UNPACK else file.name.lower()
    return (
        named.endswith(LINES)
        and _is_text(head)
        and head.lstrip().startswith(b"{")
        and not line_row(head.decode(), "").fault
    )


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked. DataError where it is not whole."""
    kind = file.suffix.lower()
    try:
        with UNPACK[kind](file) if kind in UNPACK else file.open("rb") as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: not a whole {kind[1:]} file: {error}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def _line(stream: BinaryIO) -> bytes:
    """The next line; of one that is too long as much as tells so, because all of it may not fit into memory."""
    line = more = stream.readline(TOO_MANY_BYTES)
    while len(more) == TOO_MANY_BYTES and not more.endswith(b"\n"):
        more = stream.readline(TOO_MANY_BYTES)
    return line if line is more else line.decode(errors="ignore").encode()


def _numbered(file: Path) -> Iterator[tuple[int, bytes]]:
    with _opened(file) as stream:
        yield from enumerate(iter(partial(_line, stream), b""), 1)


def _csv_lines(file: Path) -> Iterator[str]:
    """Lines with their ends; a carriage return alone ends one too. DataError for what is not text."""
    for number, line in _numbered(file):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise DataError(f"{file}:{number}: not UTF-8 text; is this a binary file?") from None
        if "\0" in text:
            raise DataError(f"{file}:{number}: holds a zero byte; is this a binary file?")
        yield from io.StringIO(text, newline="") if "\r" in text[:-2] else (text,)


def _lines(file: Path) -> Iterator[Row]:
    for number, line in _numbered(file):
        text = line.decode(errors="surrogateescape")
        if text.strip():
            yield line_row(text, f"{file}:{number}")


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if table.metadata.num_rows > files.MOST_ROWS:
                raise OSError
            for batch in table.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield files.table_row(row, f"{file}:{number}")
    except (pyarrow.ArrowException, OSError):
        if number:
            raise DataError(f"{file}: the file is damaged behind row {number}") from None
        yield from files.read_rows(file)  # tells what is wrong
    else:
        if not number:
            raise DataError(f"{file}: the file holds no rows")
