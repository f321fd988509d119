"""The forms of data that a reward model is evaluated on."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from reward_data import DataError
from rlhf.evaluation import items
from rlhf.evaluation.items import Item, Refused, read_items

PAIR = {"prompt": "question", "chosen": "yes", "rejected": "no"}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path: Path, rows: list) -> list[Item | Refused]:
    return list(read_items(write(tmp_path / "rows.jsonl", rows)))


def test_pairs_keep_their_subset(tmp_path: Path) -> None:
    rows = [{**PAIR, "subset": "math-prm", "id": 7}, {**PAIR, "category": "own"}, PAIR]
    first, second, third = read(tmp_path, rows)
    assert isinstance(first, Item)
    assert (first.form, first.responses, first.subset, first.name) == ("pair", ("yes", "no"), "math-prm", "7")
    assert [one.subset for one in (second, third) if isinstance(one, Item)] == ["own", ""]
    assert third.source.endswith("rows.jsonl:3")


def test_reward_bench_2_rows_are_best_of_n(tmp_path: Path) -> None:
    row = {
        "id": "tied:3",
        "prompt": "q",
        "chosen": ["a", "b"],
        "rejected": ["c", "d"],
        "subset": "Ties",
        "num_correct": 2,
    }
    (found,) = read(tmp_path, [row])
    assert isinstance(found, Item)
    assert (found.form, found.responses, found.correct) == ("best_of", ("a", "b", "c", "d"), 2)
    assert (found.name, found.subset) == ("tied:3", "Ties")


def test_lists_have_the_scores_of_another_judge(tmp_path: Path) -> None:
    row = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2.5, 0]}
    bad = [{**row, "scores": [1]}, {**row, "scores": [1, "x", 2]}, {**row, "responses": ["a", "", "c"]}]
    found, *refused = read(tmp_path, [row, *bad])
    assert isinstance(found, Item) and (found.form, found.judged) == ("list", (1.0, 2.5, 0.0))
    assert [one.source[-1] for one in refused if isinstance(one, Refused)] == ["2", "3", "4"]


def test_turns_and_prompts(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    a, b, c = read(tmp_path, [{**PAIR, "prompt": turns}, {**PAIR, "prompt": " Question"}, PAIR])
    assert isinstance(a, Item) and isinstance(b, Item) and isinstance(c, Item)
    assert (a.turns, b.turns) == (2, 1)
    assert b.prompt_digest == c.prompt_digest != a.prompt_digest


def test_a_file_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no usable row; the first: .*rows\.jsonl:1: "):
        read(tmp_path, [{**PAIR, "chosen": ""}])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_streamed_rows_are_those_of_a_file_read_whole(name: str, tmp_path: Path) -> None:
    rows = [{**PAIR, "chosen": f"yes {n}"} for n in range(2500)]
    rows[1700]["chosen"] = ""
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows))
    found = list(read_items(path))
    assert [one.responses[0] for one in found if isinstance(one, Item)] == [
        f"yes {n}" for n in range(2500) if n != 1700
    ]
    assert sum(isinstance(one, Refused) for one in found) == 1


def test_json_lines_are_never_whole_in_memory(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = write(tmp_path / f"{count}.jsonl", [{**PAIR, "chosen": "long " * 200}] * count)
        tracemalloc.start()
        assert sum(1 for _ in read_items(path)) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(12 * items.CHUNK) < 1.2 * peak(6 * items.CHUNK)
