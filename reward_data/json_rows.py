"""Rows of JSON text, whatever the file's name: one value per line, one list, or concatenated values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reward_data.errors import DataError
from reward_data.rows import Row, too_long

BLANK = " \t\r\n"
OTHER_BYTE = re.compile("[\udc80-\udcff]|\\0")  # as decoding with surrogateescape leaves it
SPEAKERS = ("role", "from")  # keys of a message: a list of messages is one row, not a list of rows


class _Twice(ValueError):
    """A duplicate key in one object: it is unclear which value is meant."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


STRICT = json.JSONDecoder(object_pairs_hook=_object)
PLAIN = json.JSONDecoder()
BROKEN = (ValueError, RecursionError)  # ValueError also for a whole number of more than 4300 digits


def json_rows(file: Path, text: str) -> Iterator[Row]:
    """Rows of a JSON file. A broken line makes a bad row; a broken list makes a broken file (DataError)."""
    start = _skip(text, 0, BLANK)
    named_lines = not {".jsonl", ".ndjson"}.isdisjoint(suffix.lower() for suffix in file.suffixes)
    first, *rest = text[start:].strip().split("\n", 1)
    head = line_row(first, "")
    if text[start] == "[" and not _is_row(head, named_lines, rest):
        return _only_list(file, text, start)
    if not head.fault and (rest or named_lines):
        return _line_rows(file, text)
    return _odd_rows(file, text, start, named_lines)


def _is_row(head: Row, named_lines: bool, rest: list[str]) -> bool:
    """Whether a first line that begins with a bracket is one of many rows, and not the list of all rows."""
    if head.fault:
        return named_lines and bool(rest) and _has_row(rest[0], "[")
    value = head.value
    dialogue = bool(value) and isinstance(value[0], dict) and not value[0].keys().isdisjoint(SPEAKERS)
    return bool(rest) or (named_lines and dialogue)


def _odd_rows(file: Path, text: str, start: int, named_lines: bool) -> Iterator[Row]:
    """Objects over several lines or with commas between them, an object whose `data` is the list, or a broken file."""
    stream = _stream_rows(file, text, start)
    if stream is not None and (len(stream) > 1 or (named_lines and "data" not in (stream[0].value or {}))):
        return iter(stream)
    where = _find_data_key(text, start)
    if where is not None:
        return _list_rows(file, text, where)[0]
    if stream is None and (named_lines or _has_row(text, "{")):
        return _line_rows(file, text)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    except BROKEN as error:
        raise DataError(f"{file}: not JSON that can be read: {error}") from None
    raise DataError(
        f"{file}: rows must be a list, or an object with the list under the key 'data'; "
        "from pandas, write them with to_json(orient='records', lines=True)"
    )


def _has_row(text: str, bracket: str) -> bool:
    """Whether any line is a row: then the file consists of lines, some of them broken."""
    return any(line.startswith(bracket) and not line_row(line, "").fault for line in text.split("\n"))


def _line_rows(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield line_row(line, f"{file}:{number}")


def line_row(line: str, place: str) -> Row:
    """The row of one line. A trailing comma is allowed, as in a list without its brackets."""
    line = line.strip()
    if fault := too_long(len(line)):
        return Row(None, place, fault)
    if other := OTHER_BYTE.search(line):
        return Row(None, place, f"not UTF-8 text: byte 0x{ord(other[0]) & 0xFF:02x}")
    try:
        return Row(STRICT.decode(line[:-1] if line.endswith(("},", "],")) else line), place)
    except _Twice as error:
        return Row(None, place, str(error))
    except BROKEN as error:
        return Row(None, place, f"not JSON: {error}")


def _stream_rows(file: Path, text: str, start: int) -> list[Row] | None:
    """Concatenated objects; None if there is anything else between them."""
    rows: list[Row] = []
    position, line = start, 1 + text.count("\n", 0, start)
    while position < len(text):
        if text[position] != "{":
            return None
        try:
            row, after = _value(text, position, f"{file}:{line}")
        except BROKEN:
            return None
        rows.append(row)
        after = _skip(text, after, BLANK + ",")
        line, position = line + text.count("\n", position, after), after
    return rows


def _only_list(file: Path, text: str, start: int) -> Iterator[Row]:
    rows, end = _list_rows(file, text, start)
    if text[end:].strip():
        raise DataError(f"{file}:{text.count(chr(10), 0, end) + 1}: text after the list of rows")
    return rows


def _list_rows(file: Path, text: str, start: int) -> tuple[Iterator[Row], int]:
    """Elements of the list that begins at `start`, parsed one by one to know the line of each, and where it ends."""
    position, line = start + 1, 1 + text.count("\n", 0, start)
    rows: list[Row] = []
    while True:
        after = _skip(text, position, BLANK if not rows else BLANK + ",")
        line, position = line + text.count("\n", position, after), after
        if text[position : position + 1] == "]":
            break
        try:
            row, after = _value(text, position, f"{file}:{line}")
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
        except BROKEN as error:
            raise DataError(f"{file}:{line}: not JSON that can be read: {error}") from None
        rows.append(row)
        line, position = line + text.count("\n", position, after), after
    if not rows:
        raise DataError(f"{file}: the list of rows is empty")
    return iter(rows), position + 1


def _value(text: str, position: int, place: str) -> tuple[Row, int]:
    """The value at `position` as a row, and where it ends."""
    try:
        value, after = STRICT.raw_decode(text, position)
        fault = too_long(after - position)
        return Row(None if fault else value, place, fault), after
    except _Twice as error:
        return Row(None, place, str(error)), PLAIN.raw_decode(text, position)[1]


def _skip(text: str, position: int, what: str) -> int:
    while position < len(text) and text[position] in what:
        position += 1
    return position


def _find_data_key(text: str, start: int) -> int | None:
    """Position of the list under the key `data` of the object at `start`; None if there is none."""
    position = start + 1
    try:
        while text[start] == "{":
            position = _skip(text, position, BLANK + ",")
            key, position = PLAIN.raw_decode(text, position)
            position = _skip(text, position, BLANK + ":")
            if key == "data" and text[position : position + 1] == "[":
                return position
            _, position = PLAIN.raw_decode(text, position)
    except BROKEN:
        return None
    return None
