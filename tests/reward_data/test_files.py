"""Files of every kind give the same rows, with true line numbers; broken files give one clear message."""

from __future__ import annotations

import gzip
import hashlib
import json

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_data.errors import DataError
from reward_data.files import digest_of, find, read_rows

ROWS = [{"a": "one", "b": 'two "quoted", and\nbroken'}, {"a": "ünï", "b": ""}]


def write(folder, name, data):
    file = folder / name
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def lines(file):
    return [int(row.place.rsplit(":", 1)[1]) for row in read_rows(file)]


JSON_LINES = "\n\n".join(json.dumps(row) for row in ROWS) + "\n"


@pytest.mark.parametrize(
    ("name", "data", "expected_lines"),
    [
        ("x.jsonl", JSON_LINES, [1, 3]),
        ("bom.jsonl", b"\xef\xbb\xbf" + JSON_LINES.encode(), [1, 3]),
        ("x.jsonl.gz", gzip.compress(JSON_LINES.encode()), [1, 3]),
        ("list.json", json.dumps(ROWS, indent=1), [2, 6]),
        ("flat.json", json.dumps(ROWS), [1, 1]),
        ("data.json", json.dumps({"version": {"data": [1]}, "data": ROWS}, indent=1), [8, 12]),
        ("lines.json", JSON_LINES, [1, 3]),
        ("x.csv", 'a,b\none,"two ""quoted"", and\nbroken"\nünï,\n', [2, 4]),
    ],
)
def test_rows_and_line_numbers(tmp_path, name, data, expected_lines):
    file = write(tmp_path, name, data)
    assert [row.value for row in read_rows(file)] == ROWS
    assert lines(file) == expected_lines


def test_parquet_counts_rows(tmp_path):
    file = tmp_path / "x.parquet"
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}, {"messages": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert [(row.value, row.place) for row in read_rows(file)] == [(rows[0], f"{file}:1"), (rows[1], f"{file}:2")]


@given(st.lists(st.dictionaries(st.text(), st.text()), min_size=1), st.sampled_from([None, 0, 3]))
def test_json_list_gives_what_json_reads(tmp_path_factory, rows, indent):
    file = write(tmp_path_factory.mktemp("json"), "x.json", json.dumps(rows, indent=indent, ensure_ascii=False))
    assert [row.value for row in read_rows(file)] == rows


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", "", "x.jsonl: the file is empty"),
        ("x.jsonl.gz", gzip.compress(b""), "the file is empty"),
        ("x.json", "[]", "the list of rows is empty"),
        ("x.json", "\n[\n]\n", "the list of rows is empty"),
        (
            "x.jsonl",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS pointer.*git lfs pull",
        ),
        ("x.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ("x.jsonl", b'{"a": 1}\n\x89PNG\xff\xfe', "x.jsonl:2: not UTF-8 text .*binary"),
        ("x.jsonl", b'{"a": 1}\n\x00\x01', "x.jsonl:2: holds a zero byte; is this a binary file"),
        ("x.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(JSON_LINES.encode())[:-12], "not a whole gzip file"),
        ("x.parquet", b"PAR1 is not enough", "not a parquet file"),
        ("x.json", '[\n{"a": 1},\n{"a": }\n]', r"x.json:3: not JSON: Expecting value \(column 7\)"),
        ("x.json", '[\n{"a": 1}\n', "x.json:3: not JSON"),
        ("x.json", '[{"a": 1}] and more', "x.json:1: text after the list of rows"),
        ("x.json", '{"rows": []}', "rows must be a list, or an object with the list under the key 'data'"),
        ("x.json", '{\n"rows": [\n', "x.json:3: not JSON"),
        ("x.json", "7", "rows must be a list"),
        ("x.txt", "text", "unknown kind of file; a name must end in .json, .jsonl"),
    ],
)
def test_unreadable_file(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        for file in find(write(tmp_path, name, data)).files:
            list(read_rows(file))


def test_broken_line_is_a_fault_of_that_row_alone(tmp_path):
    rows = list(read_rows(write(tmp_path, "x.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n')))
    assert [bool(row.fault) for row in rows] == [False, True, False]
    assert rows[1].fault.startswith("not JSON") and rows[1].place.endswith(":2")


def test_short_csv_row_is_a_fault_of_that_row_alone(tmp_path):
    rows = list(read_rows(write(tmp_path, "x.csv", "a,b\n1\n1,2\n")))
    assert [row.fault for row in rows] == ["1 cells, but the header names 2", ""]


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "x.jsonl", tmp_path / "folder", "no/such.jsonl", "nowhere"):
        with pytest.raises(DataError, match="no such file or folder"):
            find(path)


def test_folder_is_its_data_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    files = [write(tmp_path, "a.jsonl", "{}"), write(tmp_path / "b", "c.csv", "a\n1"), write(tmp_path, "z.json", "[1]")]
    write(tmp_path, "README.md", "no data")
    assert list(find(tmp_path).files) == files


def test_folder_without_data(tmp_path):
    write(tmp_path, "README.md", "no data")
    with pytest.raises(DataError, match="the folder holds no .json"):
        find(tmp_path)


def test_owner_and_name_is_a_hub_data_set():
    assert find("owner/data-set.v2").hub == "owner/data-set.v2"


def test_digest_of_one_file_is_its_sha256(tmp_path):
    one, two = write(tmp_path, "1.jsonl", "one"), write(tmp_path, "2.jsonl", "two")
    assert digest_of([one]) == hashlib.sha256(b"one").hexdigest()
    assert digest_of([one, two]) != digest_of([two, one])
