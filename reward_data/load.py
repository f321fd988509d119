"""`load`: checked records from a path, with a list of refused rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from reward_data import files, folders, meaning
from reward_data.converters import converter_for, form_of
from reward_data.converters.fields import shown
from reward_data.errors import BadRow, DataError
from reward_data.files import Row
from reward_data.records import Demonstration, Kind, Message, Preference, Prompt, Record, Tag, prompt_of

SHIPPED = Path(__file__).parent / "shipped"
SHOWN = 10  # bad rows named in one message


@dataclass(frozen=True)
class Loaded:
    rows: list
    refused: list[str]  # "file:line: reason", one per row left out
    refused_kinds: dict[str, int]  # how many of each: empty_reply, unequal_prompts, bad_row, …
    digest: str  # SHA-256 of the files that were read
    files: list[str]
    findings: list[str]  # what was not read of the source, and what looks wrong in it


@dataclass(frozen=True)
class Source:
    """Where rows are, and how they are read."""

    path: str | Path
    """A file, a folder, a hub name `owner/name`, or `shipped`."""
    format: str = "auto"
    tag: Tag | None = None
    """For rows that bring none (None: helpful)."""
    split: str | None = None
    """train (default) or held_out of the shipped data; a split of a hub data set or a folder (default train)."""
    config: str | None = None
    """A subset of a hub data set, or a folder in a folder."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column behind each key of a form: {prompt: question}; others are not read."""
    select: tuple[str | Path, str] | None = None
    """A JSON file and a key in it that holds row numbers, counted from 0 over all rows of the source."""
    limit: int | None = None
    """Keeps the first records."""


def load(kind: Kind, source: Source | str | Path, *, bad_rows: Literal["refuse", "skip"] = "refuse") -> Loaded:
    """Records of `kind` from a source or a path. DataError if it cannot be read, or for bad rows unless they are skipped."""
    source = source if isinstance(source, Source) else Source(source)
    path, format, split = source.path, source.format, source.split
    if str(path) == "shipped":
        path, format, split = _shipped(kind, split or "train"), "native", None
    tables, read, findings = _tables(path, split, source.config, source.columns)
    if source.select is not None:
        tables, read = _selected(tables, *source.select), [*read, Path(source.select[0])]
    refused: list[BadRow] = []
    made = (r for table in tables for r in records_of_table(kind, table, format, source.tag or "helpful", refused))
    records = list(islice(made, source.limit))
    if refused and bad_rows == "refuse":
        raise DataError(_message(refused, f"{path}: {len(refused)} bad rows; fix them, or skip them (bad_rows: skip)"))
    if not records:
        raise DataError(_message(refused, f"{path}: no usable row{_why_nothing(tables, format, refused)}"))
    rows = [meaning.opened(row) for table in tables for row in table.rows]
    return Loaded(
        rows=records,
        refused=[_line(bad) for bad in refused],
        refused_kinds=dict(Counter(bad.kind for bad in refused)),
        digest=files.digest_of(read) if read else files.digest_of_rows(row for table in tables for row in table.rows),
        files=[str(file) for file in read] or [str(path)],
        findings=[*findings, *(f"{path}: {found}" for found in meaning.suspicions(records, rows, kind))],
    )


@dataclass(frozen=True)
class Table:
    """The rows of one file. `first` shows the form of most of them, even if it is not selected."""

    first: Row
    rows: list[Row]


def _tables(
    path: str | Path, split: str | None, config: str | None, columns: Mapping[str, str]
) -> tuple[list[Table], list[Path], list[str]]:
    """Rows by file, the files, and what was not read of the source."""
    source = folders.find(path, split, config)
    if source.hub:
        rows = [list(files.hub_rows(source.hub, split or "train", config))]
    else:
        rows = [list(files.read_rows(file)) for file in source.files]
    if columns:
        rows = [[_renamed(row, columns) for row in table] for table in rows]
    return [Table(form_of(table), table) for table in rows if table], list(source.files), list(source.findings)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with only the named columns, under the keys of a form."""
    if row.fault or not isinstance(row.value, dict):
        return row
    for column in columns.values():
        if column not in row.value:
            return Row(None, row.place, f"no column {column!r} (columns); the row has {', '.join(map(str, row.value))}")
    return Row({key: row.value[column] for key, column in columns.items()}, row.place)


def _selected(tables: list[Table], file: str | Path, key: str) -> list[Table]:
    """Only the rows whose numbers stand under `key` of the JSON file `file`."""
    wanted = set(_row_numbers(Path(file), key))
    total = sum(len(table.rows) for table in tables)
    if beyond := sorted(n for n in wanted if not 0 <= n < total):
        raise DataError(f"{file}: '{key}' selects row {beyond[0]}, but there are only rows 0 to {total - 1}")
    kept, start = [], 0
    for table in tables:
        kept.append(Table(table.first, [row for n, row in enumerate(table.rows, start) if n in wanted]))
        start += len(table.rows)
    return kept


def _row_numbers(file: Path, key: str) -> list[int]:
    try:
        lists = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from None
    if not isinstance(lists, dict) or key not in lists:
        raise DataError(f"{file}: has no key '{key}'")
    numbers = lists[key]
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise DataError(f"{file}: '{key}' must be a list of row numbers")
    return numbers


def records_of_table(kind: Kind, table: Table, format: str, tag: Tag, refused: list[BadRow]) -> Iterator[Record]:
    """Records of one file, in order; what cannot be used goes to `refused`."""
    converter = converter_for(format, table.first)
    group = getattr(converter, "group", None)  # forms whose record needs several rows
    rows = [meaning.opened(row) for row in table.rows]
    verdicts = meaning.Verdicts(rows)
    for row in group(rows) if group else rows:
        try:
            if row.fault:
                raise BadRow(row.fault)
            if not (group or isinstance(row.value, dict) or converter.matches(row.value)):
                raise BadRow(f"the row is {shown(row.value)}, not an object with keys")
            made = _converted(kind, converter, row, tag, verdicts)
        except BadRow as bad:
            bad.place = bad.place or row.place
            refused.append(bad)
        else:
            yield from dict.fromkeys(made)  # pairs of one row share a prompt


def _converted(kind: Kind, converter: ModuleType, row: Row, tag: Tag, verdicts: meaning.Verdicts) -> list[Record]:
    """Records of one row; BadRow if they would lose or change what the row says."""
    members = row.value if hasattr(converter, "group") else [row]
    for member in members if kind != "prompts" else []:
        meaning.refuse_outranked(member)
    made = converter.convert(row, tag)
    for member in members:
        for record in made:
            meaning.refuse_lost_context(member, record, kind, getattr(converter, "SPLIT_KEYS", ()))
            if kind == "demonstrations" and isinstance(record, Demonstration):
                verdicts.refuse_unwanted(member)
    for record in made:
        meaning.refuse_transcripts(record)
    records = [_whole(_as_kind(kind, record)) for record in made]
    return [_with_columns(record, row.value) for record in records]


def _why_nothing(tables: list[Table], format: str, refused: list[BadRow]) -> str:
    """Why no row gave a record although none was refused."""
    count = sum(len(table.rows) for table in tables)
    if refused or not count:
        return "" if refused else ": the selection holds no row"
    reasons = {getattr(converter_for(format, table.first), "NO_RECORD", "") for table in tables}
    return f": {count} rows were read, but {' or '.join(sorted(filter(None, reasons))) or 'none makes a record'}"


def _as_kind(kind: Kind, record: Record) -> Record:
    """A preference is also a demonstration (its chosen response), and both contain a prompt; the reverse does not hold."""
    if kind == "prompts":
        return Prompt(prompt_of(record), record.tag, record.source)
    if kind in ("demonstrations", "answers") and isinstance(record, Preference):
        turns = (*record.prompt, Message("assistant", record.chosen))
        return Demonstration(turns, record.tag, record.source)
    if kind == "preferences" and not isinstance(record, Preference):
        raise BadRow(
            "no pair of answers here (a chosen and a rejected one), so no preference; "
            "convert to pairs: {prompt, chosen, rejected}, or name the columns of a pair (columns)",
            "no_pair",
            record.source,
        )
    if isinstance(record, Prompt):
        reason = (
            "a prompt without an answer, so no demonstration; name the column of the answer (columns), if there is one"
        )
        raise BadRow(reason, "no_answer", record.source)
    return record


def _with_columns(record: Record, value: Any) -> Record:
    """A prompt with whatever else its row holds (a reference answer, a unit test), for rewards that ask for it."""
    if not isinstance(record, Prompt) or not isinstance(value, dict):
        return record
    others = {str(key): _as_json(entry) for key, entry in value.items() if key not in ("prompt", "messages", "tag")}
    columns = {key: entry for key, entry in others.items() if entry is not None}
    for key, entry in columns.items():
        _refuse_half(json.dumps({key: entry}, ensure_ascii=False), f"column {key!a} ", record.source)
    return replace(record, columns=columns)


def _as_json(entry: Any) -> Any:
    """The entry as JSON can hold it: dates and numbers of other kinds as text, bytes not at all."""
    if isinstance(entry, dict):
        return {str(key): _as_json(inner) for key, inner in entry.items()}
    if isinstance(entry, list | tuple):
        return [_as_json(inner) for inner in entry]
    if isinstance(entry, bytes | bytearray | memoryview):
        return None
    return entry if isinstance(entry, str | int | float | bool | None) else str(entry)


def _whole(record: Record) -> Record:
    """The record, if its texts can be encoded: a JSON escape may contain half of a character."""
    texts = [message.content for message in prompt_of(record)]
    texts += [record.chosen, record.rejected] if isinstance(record, Preference) else []
    texts += [record.messages[-1].content] if isinstance(record, Demonstration) else []
    for text in texts:
        _refuse_half(text, "", record.source)
    return record


def _refuse_half(text: str, where: str, source: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise BadRow(f"{where}holds a lone surrogate ({half}), half of a character", "lone_surrogate", source) from None


def _shipped(kind: Kind, split: str) -> Path:
    if split not in ("train", "held_out"):
        raise DataError(f"shipped data has the splits train and held_out, not {split!r}")
    return SHIPPED / f"{kind}.{split}.jsonl"


def _line(bad: BadRow) -> str:
    return f"{bad.place}: {bad.reason}"


def _message(refused: list[BadRow], headline: str) -> str:
    lines = [_line(bad) for bad in refused[:SHOWN]]
    if len(refused) > SHOWN:
        lines.append(f"… and {len(refused) - SHOWN} more")
    return "\n  ".join([headline, *lines])
