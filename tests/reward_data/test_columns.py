"""What a row holds beside its prompt goes with the prompt, as JSON can hold it."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from reward_data import DataError, Message, Prompt, Source, load


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def columns(file: Path, **options: Any) -> list[dict[str, Any]]:
    loaded = load("prompts", file, **options).rows
    assert all(isinstance(row, Prompt) for row in loaded)
    return [dict(row.columns) for row in loaded]


def test_everything_but_the_prompt_and_its_tag_is_a_column(tmp_path):
    rows = [
        {"prompt": "What is 2 + 2?", "tag": "helpful", "answer": "4", "level": 1, "tests": ["f(2) == 4", "f(0) == 0"]},
        {"prompt": "Why?", "tag": "safety", "answer": "Because.", "level": 2.5, "tests": []},
    ]
    assert columns(jsonl(tmp_path, rows)) == [
        {"answer": "4", "level": 1, "tests": ["f(2) == 4", "f(0) == 0"]},
        {"answer": "Because.", "level": 2.5, "tests": []},
    ]


def test_a_column_that_a_row_lacks_is_not_among_its_columns(tmp_path):
    rows = [{"prompt": "a", "answer": None, "level": 0}, {"prompt": "b", "answer": ""}, {"prompt": "c"}]
    assert columns(jsonl(tmp_path, rows)) == [{"level": 0}, {"answer": ""}, {}]


def test_messages_have_columns_too(tmp_path):
    turns = [{"role": "user", "content": "Hi"}]
    loaded = load("prompts", jsonl(tmp_path, [{"messages": turns, "answer": {"city": "Rome", "year": 1870}}]))
    (row,) = loaded.rows
    assert row.messages == (Message("user", "Hi"),)
    assert row.columns == {"answer": {"city": "Rome", "year": 1870}}


def test_parquet_gives_what_json_can_hold(tmp_path):
    """Dates, times and decimals are text, bytes are left out, at any depth."""
    rows = [
        {
            "prompt": "When?",
            "day": date(2026, 1, 31),
            "at": datetime(2026, 1, 31, 12, 30, tzinfo=UTC),
            "price": Decimal("9.90"),
            "image": b"\x00\xff",
            "right": True,
            "cases": [{"day": date(2025, 1, 1), "image": b"\x00"}],
            "score": 0.5,
        },
        {
            "prompt": "And then?",
            "day": None,
            "at": None,
            "price": None,
            "image": None,
            "right": False,
            "cases": [],
            "score": None,
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = columns(tmp_path / "x.parquet")
    assert first == {
        "day": "2026-01-31",
        "at": "2026-01-31 12:30:00+00:00",
        "price": "9.90",
        "right": True,
        "cases": [{"day": "2025-01-01", "image": None}],
        "score": 0.5,
    }
    assert second == {"right": False, "cases": []}
    assert json.loads(json.dumps(first)) == first


def test_csv_gives_text(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,answer\nWhat is 2 + 2?,4\n")
    assert columns(tmp_path / "x.csv")[0] == {"answer": "4"}


def test_named_columns_are_read_and_no_others(tmp_path):
    file = jsonl(tmp_path, [{"question": "What is 2 + 2?", "solution": "4", "id": 7}])
    (row,) = load("prompts", Source(file, columns={"prompt": "question", "reference": "solution"})).rows
    assert row.messages == (Message("user", "What is 2 + 2?"),)
    assert row.columns == {"reference": "4"}


@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
def test_other_kinds_have_none(tmp_path, kind):
    pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "level": 3}
    (row,) = load(kind, jsonl(tmp_path, [pair])).rows
    assert not hasattr(row, "columns")


def test_prompts_that_differ_in_their_columns_alone_are_two_prompts(tmp_path):
    one, other = load("prompts", jsonl(tmp_path, [{"prompt": "a", "n": 1}, {"prompt": "a", "n": 2}])).rows
    assert one.messages == other.messages and one != other
    assert len({one, other}) == 2  # and can stand in a set


@pytest.mark.parametrize("columns", [{"answer": "4\ud83d"}, {"tests": [{"in": "\ud83d"}]}, {"a\ud83d": 4}])
def test_a_column_that_holds_half_a_character_makes_a_bad_row(tmp_path, columns):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "2 + 2?", **more}) + "\n" for more in ({}, columns)))
    with pytest.raises(DataError, match=r"prompts.jsonl:2: column '.*' holds a lone surrogate \(\\ud83d\)"):
        load("prompts", file)
    assert load("prompts", file, bad_rows="skip").refused_kinds == {"lone_surrogate": 1}
