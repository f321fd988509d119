"""Files of every kind give the same rows, with true line numbers; broken files give one clear message."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import tracemalloc

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_data import files, rows, stream
from reward_data.errors import DataError
from reward_data.files import digest_of, read_rows
from reward_data.folders import find

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
        ("x.jsonl.gz", gzip.compress(JSON_LINES.encode(), mtime=0), [1, 3]),
        ("list.json", json.dumps(ROWS, indent=1), [2, 6]),
        ("flat.json", json.dumps(ROWS), [1, 1]),
        ("data.json", json.dumps({"version": {"data": [1]}, "data": ROWS}, indent=1), [8, 12]),
        ("lines.json", JSON_LINES, [1, 3]),
        ("list.jsonl", json.dumps(ROWS), [1, 1]),
        ("indented.jsonl", json.dumps(ROWS, indent=1), [2, 6]),
        ("objects.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 5]),
        ("objects.json", "\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 5]),
        ("commas.jsonl", ",\n".join(json.dumps(row) for row in ROWS) + ",\n", [1, 2]),
        ("crlf.jsonl", JSON_LINES.replace("\n", "\r\n"), [1, 3]),
        ("utf16.jsonl", JSON_LINES.encode("utf-16"), [1, 3]),
        ("utf16be.json", json.dumps(ROWS).encode("utf-16-be"), [1, 1]),
        ("UPPER.JSONL", JSON_LINES, [1, 3]),
        ("x.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0), [1, 1]),
        ("x.jsonl.bz2", bz2.compress(JSON_LINES.encode()), [1, 3]),
        ("x.jsonl.xz", lzma.compress(JSON_LINES.encode()), [1, 3]),
        ("x.jsonl.zst", pyarrow.compress(JSON_LINES.encode(), "zstd", asbytes=True), [1, 3]),
        ("x.tsv", 'a\tb\none\t"two ""quoted"", and\nbroken"\nünï\t\n', [2, 4]),
        ("semicolons.csv", 'a;b\none;"two ""quoted"", and\nbroken"\nünï;\n', [2, 4]),
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
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "the file is empty"),
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
        ("x.jsonl.gz", gzip.compress(JSON_LINES.encode(), mtime=0)[:-12], "not a whole gzip file"),
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


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(("other", "byte"), [(b'{"a": "caf\xe9"}', "e9"), (b'{"a": "\x00"}', "00"), (b"\x89PNG", "89")])
def test_other_bytes_are_a_fault_of_that_row_alone(tmp_path, name, other, byte):
    content = b'{"a": "caf\xc3\xa9"}\n' + other + b'\n{"a": 3}\n'
    rows = list(read_rows(write(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)))
    assert [row.fault for row in rows] == ["", f"not UTF-8 text: byte 0x{byte}", ""]
    assert (rows[0].value, rows[1].place) == ({"a": "café"}, f"{tmp_path / name}:2")
    if not name.endswith("gz"):
        assert [rows] == list(stream.row_chunks(tmp_path / name))


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


@given(
    st.lists(st.dictionaries(st.text(), st.text() | st.lists(st.text()), min_size=1), min_size=1),
    st.sampled_from([None, 2]),
    st.sampled_from(["list", "lines", "commas"]),
    st.sampled_from([".json", ".jsonl"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.booleans(),
)
def test_rows_survive_every_way_to_write_json(tmp_path_factory, rows, indent, way, suffix, encoding, ascii_only):
    values = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    if way == "list":
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    else:
        text = ("\n" if way == "lines" else ",\n").join(values) + "\n"
    if suffix == ".json" and way != "list" and len(rows) == 1:
        return  # one object in a .json file is no list of rows
    file = write(tmp_path_factory.mktemp("json"), f"x{suffix}", text.encode(encoding))
    assert [row.value for row in read_rows(file)] == rows


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1), st.sampled_from(",;\t"))
def test_cells_survive_every_delimiter(tmp_path_factory, rows, delimiter):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("prompt text", "answer"), *rows])
    file = write(tmp_path_factory.mktemp("csv"), "x.csv", text.getvalue())
    assert [tuple(row.value.values()) for row in read_rows(file)] == rows


@given(st.binary(), st.sampled_from([".json", ".jsonl", ".csv", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"]))
def test_any_bytes_are_rows_or_one_message(tmp_path_factory, data, suffix):
    file = write(tmp_path_factory.mktemp("any"), f"x{suffix}", data)
    try:
        assert all(row.place.startswith(f"{file}:") for row in read_rows(file))
    except DataError as error:
        assert error.message.startswith(str(file))


def test_a_key_that_stands_twice_is_a_fault_of_its_row(tmp_path):
    for name, text in (("x.jsonl", '{"a": 1, "a": 2}\n{"a": 3}'), ("x.json", '[{"a": 1, "a": 2}, {"a": 3}]')):
        faults = [row.fault for row in read_rows(write(tmp_path, name, text))]
        assert faults == ["key 'a' stands twice in one object", ""]


def test_a_broken_first_line_is_a_fault_of_that_row_alone(tmp_path):
    for first in ('{"a": [{"b", broken', '{"a": 1} and more', "text", "9" * 5000):
        rows = list(read_rows(write(tmp_path, "x.jsonl", first + '\n{"a": 2}\n')))
        assert [bool(row.fault) for row in rows] == [True, False], first


def test_a_quotation_mark_that_nothing_closes_is_named(tmp_path):
    with pytest.raises(DataError, match="x.csv:3: a quotation mark opens here that nothing closes"):
        list(read_rows(write(tmp_path, "x.csv", 'a,b\n1,2\n3,"4\n5,6\n')))


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="x.csv:1: two columns are called 'a'"):
        list(read_rows(write(tmp_path, "x.csv", "a,a\n1,2\n")))


ROW = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "packed"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_a_bomb_ends_in_a_message(tmp_path, monkeypatch, suffix, packed):
    monkeypatch.setattr(files, "NEVER_TOO_MUCH", 3 << 20)
    file = tmp_path / f"rows.jsonl.{suffix}"
    file.write_bytes(packed(ROW * 300_000))
    with pytest.raises(DataError, match="unpacks to over .* more than 100 times its size.*unpack it yourself"):
        list(read_rows(file))
    file.write_bytes(packed(ROW * 60_000))
    assert len(list(read_rows(file))) == 60_000


def test_a_bomb_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "NEVER_TOO_MUCH", 1 << 20)
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(bytes(200 << 20), 9))
    tracemalloc.start()
    with pytest.raises(DataError, match="unpacks to over"):
        list(read_rows(file))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 60 << 20  # 100 times 0.2 MB, and the pieces


def test_a_huge_row_is_a_fault_of_that_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_CHARACTERS", 1000)
    short, huge = ({"prompt": "p", "chosen": text, "rejected": "b"} for text in ("a", "a" * 2000))
    table = pyarrow.Table.from_pylist([short, huge, short])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (short, huge, short)))
    (tmp_path / "rows.json").write_text(json.dumps([short, huge, short]))
    for name in ("rows.parquet", "rows.jsonl", "rows.json"):
        found = list(read_rows(tmp_path / name))
        assert [bool(row.fault) for row in found] == [False, True, False], name
        assert "characters, and 1,000 are the most" in found[1].fault
        assert found[1].place == f"{tmp_path / name}:{2 if name != 'rows.json' else 1}"


def test_a_parquet_file_that_announces_too_many_rows_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_ROWS", 2)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}] * 3), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="announces 3 rows, and 2 are the most"):
        list(read_rows(tmp_path / "rows.parquet"))


def test_a_line_without_an_end_is_not_kept_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_CHARACTERS", 1000)
    monkeypatch.setattr(stream, "TOO_MANY_BYTES", 4004)
    (tmp_path / "rows.jsonl").write_bytes(ROW + b'{"prompt": "' + b"a" * 9000 + b'"}\n' + ROW)
    found = [row for chunk in stream.row_chunks(tmp_path / "rows.jsonl") for row in chunk]
    assert [bool(row.fault) for row in found] == [False, True, False]
    assert [row.place[-2:] for row in found] == [":1", ":2", ":3"]
