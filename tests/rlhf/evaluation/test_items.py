"""The forms of data that a reward model is evaluated on."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reward_data import DataError
from reward_data.files import read_rows
from reward_data.stream import row_chunks
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


def write_as(path: Path, rows: list[dict]) -> Path:
    """`rows`, all with the same keys, in the form that the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
        return path
    text = "\n".join(map(json.dumps, rows))
    if path.name.endswith(".json"):
        text = json.dumps(rows)
    if ".csv" in path.name:
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, PAIR)
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    pack[".zst"] = lambda data: pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(pack.get(path.suffix, bytes)(text.encode()))
    return path


LARGE = ["rows.jsonl", "rows.jsonl.gz", "rows.ndjson.bz2", "rows.jsonl.xz", "rows.jsonl.zst", "rows.csv", "rows.csv.gz"]
LARGE += ["rows.parquet"]


@pytest.mark.parametrize("name", [*LARGE, "rows.json"])
def test_streamed_rows_are_those_of_a_file_read_whole(name: str, tmp_path: Path) -> None:
    rows = [{**PAIR, "chosen": f"yes {n}", "rejected": 'no, "never"\nand a line'} for n in range(1100)]
    rows[1050]["chosen"] = ""
    path = write_as(tmp_path / name, rows)
    found = list(read_items(path))
    assert [one.responses[0] for one in found if isinstance(one, Item)] == [
        f"yes {n}" for n in range(1100) if n != 1050
    ]
    assert sum(isinstance(one, Refused) for one in found) == 1
    streamed = [row for chunk in row_chunks(path, 70) for row in chunk]
    assert streamed == list(read_rows(path))


def test_json_lines_are_never_whole_in_memory(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = write(tmp_path / f"{count}.jsonl", [{**PAIR, "chosen": "long " * 200}] * count)
        tracemalloc.start()
        assert sum(1 for _ in read_items(path)) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(8 * items.CHUNK) < 1.2 * peak(4 * items.CHUNK)


@pytest.mark.parametrize("name", LARGE[1:])
def test_large_files_are_never_whole_in_memory(name: str, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rows = [{**PAIR, "chosen": random.Random(n).randbytes(1000).hex()} for n in range(count)]
        path = write_as(tmp_path / f"{count}.{name}", rows)
        tracemalloc.start()
        assert sum(len(chunk) for chunk in row_chunks(path, 100)) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(900) < 1.2 * peak(300)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.bz2", "rows.jsonl.xz", "rows.jsonl.zst", "rows.parquet"])
def test_a_cut_off_file_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    path = write_as(tmp_path / name, [{**PAIR, "chosen": random.Random(n).randbytes(200).hex()} for n in range(1500)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=rf"{name}: (not a whole|cannot be read|not a parquet file)"):
        list(read_items(path))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("rows.csv", b"prompt,chosen,rejected\nq,yes,\xff\n", "rows.csv:2: not UTF-8 text"),
        ("rows.csv", b"prompt,chosen,rejected\nq,yes,n\0o\n", "rows.csv:2: holds a zero byte"),
        ("rows.csv.gz", b"prompt,chosen,rejected\n", "not a whole gz"),
        ("rows.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        ("rows.parquet", b"no such thing", "not a parquet file"),
        ("rows.parquet", b"", "the file is empty"),
    ],
)
def test_what_cannot_be_streamed_is_told(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        list(read_items(tmp_path / name))


@pytest.mark.parametrize("text", ["sep=;\nprompt;chosen;rejected\nq;a;b\n", "prompt,chosen,rejected\rq,a,b\r"])
def test_other_forms_of_csv_stream_too(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode())
    (found,) = read_items(path)
    assert isinstance(found, Item) and found.responses == ("a", "b")
    assert [row for chunk in row_chunks(path) for row in chunk] == list(read_rows(path))
