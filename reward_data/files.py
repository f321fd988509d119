"""Rows of a file, a folder or a hub data set, each with the place that it came from.

A row is whatever the file holds (usually a dict of keys to values); what it means is the business of `converters`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_data.errors import DataError

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".csv")
LFS_HEADER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Row:
    value: Any
    place: str  # "file:line", or "file:row" for parquet, both counted from 1
    fault: str = ""  # why the row could not even be parsed


@dataclass(frozen=True)
class Source:
    """Where rows come from: `files` on disk, or one hub data set."""

    files: tuple[Path, ...]
    hub: str = ""


def find(path: str | Path) -> Source:
    """The data files behind a file, a folder (searched deeply) or a hub name `owner/name`; DataError if none."""
    place = Path(path)
    if place.is_dir():
        files = tuple(sorted(f for f in place.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file()))
        if not files:
            raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
        return Source(files)
    if place.exists():
        if not place.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; a name must end in {', '.join(SUFFIXES)}")
        return Source((place,))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not str(path).endswith(SUFFIXES):
        return Source((), hub=str(path))
    raise DataError(f"{path}: no such file or folder")


def read_rows(file: Path) -> Iterator[Row]:
    """Rows of one file. DataError where the file as a whole cannot be read."""
    data = _bytes_of(file)
    if file.name.endswith(".parquet"):
        return _parquet_rows(file, data)
    text = _text_of(file, data)
    if file.name.endswith(".csv"):
        return _csv_rows(file, text)
    return _json_rows(file, text) if file.name.endswith(".json") else _line_rows(file, text)


def digest_of(files: list[Path]) -> str:
    """SHA-256 of the one file, or of the list of digests of several."""
    digests = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def digest_of_rows(rows: Iterable[Row]) -> str:
    """SHA-256 of rows that came without a file."""
    lines = (json.dumps(row.value, sort_keys=True, default=str) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Rows of a hub data set, through the `datasets` library."""
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split=split)
    except Exception as error:  # noqa: BLE001 - of many types: no network, no such set, no such split, no library
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(f"{name}: no such file, and no hub data set with split {split}: {reason[0]}") from None
    return (Row(dict(row), f"{name}[{split}]:{n}") for n, row in enumerate(rows, 1))


def _bytes_of(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if data.startswith(LFS_HEADER):
        raise DataError(f"{file}: a Git LFS pointer, not the data itself; fetch the data with `git lfs pull`")
    if file.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{file}: not a whole gzip file: {error}") from None
    if not data.strip():
        raise DataError(f"{file}: the file is empty")
    return data


def _text_of(file: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not UTF-8 text (byte {error.start}); is this a binary file?") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{file}:{line}: holds a zero byte; is this a binary file?")
    return text


def _line_rows(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _parsed(line, f"{file}:{number}")


def _parsed(line: str, place: str) -> Row:
    try:
        return Row(json.loads(line), place)
    except (json.JSONDecodeError, RecursionError) as error:
        return Row(None, place, f"not JSON: {error}")


def _json_rows(file: Path, text: str) -> Iterator[Row]:
    """A list, an object whose `data` is a list, or, as some publish it, JSON lines under the name .json."""
    start = len(text) - len(text.lstrip())
    if text[start] == "[":
        rows, end = _list_rows(file, text, start)
        if text[end:].strip():
            raise DataError(f"{file}:{text.count(chr(10), 0, end) + 1}: text after the list of rows")
        return rows
    where = _find_data_key(text, start)
    if where is not None:
        return _list_rows(file, text, where)[0]
    first, *rest = text.strip().split("\n", 1)
    if rest and not _parsed(first, "").fault:
        return _line_rows(file, text)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    raise DataError(f"{file}: rows must be a list, or an object with the list under the key 'data'")


def _list_rows(file: Path, text: str, start: int) -> tuple[Iterator[Row], int]:
    """Elements of the list that begins at `start`, parsed one by one to know the line of each, and where it ends."""
    position, line = start + 1, 1 + text.count("\n", 0, start)
    rows: list[Row] = []
    while True:
        after = _skip(text, position, " \t\r\n" if not rows else " \t\r\n,")
        line, position = line + text.count("\n", position, after), after
        if text[position : position + 1] == "]":
            break
        value, after = _decode(file, text, position)
        rows.append(Row(value, f"{file}:{line}"))
        line, position = line + text.count("\n", position, after), after
    if not rows:
        raise DataError(f"{file}: the list of rows is empty")
    return iter(rows), position + 1


def _decode(file: Path, text: str, position: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None


def _skip(text: str, position: int, what: str) -> int:
    while position < len(text) and text[position] in what:
        position += 1
    return position


def _find_data_key(text: str, start: int) -> int | None:
    """Position of the list under the key `data` of the object at `start`; None if there is none."""
    decoder, position = json.JSONDecoder(), start + 1
    try:
        while True:
            position = _skip(text, position, " \t\r\n,")
            key, position = decoder.raw_decode(text, position)
            position = _skip(text, position, " \t\r\n:")
            if key == "data" and text[position : position + 1] == "[":
                return position
            _, position = decoder.raw_decode(text, position)
    except json.JSONDecodeError:
        return None


def _csv_rows(file: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # answers may be longer than the module's 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""))
    header, line = next(reader), reader.line_num + 1
    for cells in reader:
        place, line = f"{file}:{line}", reader.line_num + 1
        if not cells:
            continue
        fault = "" if len(cells) == len(header) else f"{len(cells)} cells, but the header names {len(header)}"
        yield Row(dict(zip(header, cells, strict=False)), place, fault)


def _parquet_rows(file: Path, data: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from None
    return (Row(row, f"{file}:{number}") for number, row in enumerate(table.to_pylist(), 1))
