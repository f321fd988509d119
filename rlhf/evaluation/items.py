"""What a reward model is evaluated on: a prompt with its responses, and what people or another judge said of them.

Forms of a file, by its first row:

pair      a chosen and a rejected response, in any form that training reads; RewardBench's rows are pairs with a `subset`
best_of   `chosen` and `rejected` are lists of texts, as in RewardBench 2: any of the chosen is right
list      `responses` with `scores` of another judge
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from reward_data import DataError, Preference, Prompt, normalised_prompt
from reward_data.errors import BadRow
from reward_data.records import Message
from reward_data.rows import Row
from reward_data.stream import CHUNK, joins_rows, records_of, row_chunks

Form = Literal["pair", "best_of", "list"]


@dataclass(frozen=True)
class Item:
    form: Form
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]  # of a pair: chosen, rejected
    correct: int  # the first so many responses are right; 0 in a list
    source: str  # "file:line"
    file: str
    name: str = ""  # the row's own id
    rating: str = "unrated"
    tag: str = "helpful"
    subset: str = ""
    judged: tuple[float, ...] = ()  # scores of another judge, one per response of a list

    @property
    def turns(self) -> int:
        return sum(message.role == "user" for message in self.prompt)

    @property
    def prompt_digest(self) -> str:
        """What prompts that differ only in case and white space have in common: 63 bits."""
        digest = hashlib.blake2b(normalised_prompt(self.prompt).encode(), digest_size=8).digest()
        return f"{int.from_bytes(digest, 'big') >> 1:016x}"


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used, and why."""

    source: str
    reason: str


def read_items(file: Path) -> Iterator[Item | Refused]:
    """The items of one file in its order, a chunk of rows in memory at a time. DataError if it holds none."""
    first: list[Row] | None = None
    found, refused = False, ""
    for rows in _chunks(file):
        first = first or rows
        form = _form_of(first)
        for entry in _pairs(file, first, rows) if form == "pair" else _grouped(file, form, rows):
            if isinstance(entry, Item):
                found = True
            elif not refused:
                refused = f"; the first: {entry.source}: {entry.reason}"
            yield entry
    if not found:
        raise DataError(f"{file}: no usable row{refused}")


def _chunks(file: Path) -> Iterator[list[Row]]:
    """Chunks of rows; one chunk where the form makes a record of rows that stand anywhere in the file."""
    chunks = row_chunks(file)
    first = next(chunks, [])
    if len(first) == CHUNK and _form_of(first) == "pair" and joins_rows(first):
        yield [*first, *chain.from_iterable(chunks)]
    elif first:
        yield first
        yield from chunks


def _form_of(rows: Sequence[Row]) -> Form:
    value = next((row.value for row in rows if isinstance(row.value, dict)), {})
    if isinstance(value.get("responses"), list) and "scores" in value:
        return "list"
    sides = [value.get("chosen"), value.get("rejected")]
    texts = all(isinstance(side, list) and side and all(isinstance(text, str) for text in side) for side in sides)
    return "best_of" if texts else "pair"


def _pairs(file: Path, first: list[Row], rows: list[Row]) -> Iterator[Item | Refused]:
    """Pairs in the order of the file, between them the rows that are none."""
    records, refused = records_of("preferences", first, rows)
    values = {row.place: row.value for row in rows if isinstance(row.value, dict)}
    for bad in refused:
        yield Refused(bad.place or str(file), bad.reason)
    for record in records:
        assert isinstance(record, Preference)
        value = values.get(record.source, {})
        yield Item(
            form="pair",
            prompt=record.prompt,
            responses=(record.chosen, record.rejected),
            correct=1,
            source=record.source,
            file=str(file),
            name=str(value.get("id", "")),
            rating=record.rating,
            tag=record.tag,
            subset=_label(value),
        )


def _grouped(file: Path, form: Form, rows: list[Row]) -> Iterator[Item | Refused]:
    for row in rows:
        try:
            if row.fault or not isinstance(row.value, dict):
                raise BadRow(row.fault or "the row is no object with keys")
            yield _group(file, form, row)
        except BadRow as bad:
            yield Refused(row.place, bad.reason)


def _group(file: Path, form: Form, row: Row) -> Item:
    value, judged = row.value, ()
    if form == "list":
        responses, correct = _texts(value, "responses"), 0
        judged = _numbers(value, "scores")
        if len(judged) != len(responses) or len(responses) < 2:
            raise BadRow(
                f"{len(responses)} 'responses' and {len(judged)} 'scores'; give as many of each, and 2 at least"
            )
    else:
        chosen, rejected = _texts(value, "chosen"), _texts(value, "rejected")
        responses, correct = (*chosen, *rejected), len(chosen)
    asked = {key: entry for key, entry in value.items() if key in ("prompt", "messages", "instruction", "input")}
    prompts, refused = records_of("prompts", [Row(asked, row.place)], [Row(asked, row.place)])
    if refused:
        raise refused[0]
    assert isinstance(prompts[0], Prompt)
    return Item(
        form=form,
        prompt=prompts[0].messages,
        responses=responses,
        correct=correct,
        source=row.place,
        file=str(file),
        name=str(value.get("id", "")),
        subset=_label(value),
        judged=judged,
    )


def _label(value: dict[str, Any]) -> str:
    """The subset or category that a benchmark's row names."""
    return next((value[key] for key in ("subset", "category") if isinstance(value.get(key), str)), "")


def _texts(value: dict[str, Any], key: str) -> tuple[str, ...]:
    texts = value.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRow(f"key '{key}' must be a list of texts")
    return tuple(texts)


def _numbers(value: dict[str, Any], key: str) -> tuple[float, ...]:
    numbers = value.get(key)
    if not isinstance(numbers, list) or not all(type(n) in (int, float) and abs(n) < float("inf") for n in numbers):
        raise BadRow(f"key '{key}' must be a list of numbers")
    return tuple(map(float, numbers))
