"""`load`: from a path to records, refusing or skipping what cannot be used."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest

import reward_data
from reward_data import DataError, Demonstration, Message, Preference, Prompt, Source, load

PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
GRADED = {"prompt": "Hi", "response": "Hello!", "helpfulness": 4}


def write(folder, rows, name="x.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_bad_rows_are_refused_together_with_file_line_key_and_reason(tmp_path):
    file = write(tmp_path, [PAIR, {**PAIR, "chosen": 3}, {**PAIR, "rejected": True}, PAIR])
    with pytest.raises(DataError) as error:
        load("preferences", file)
    assert error.value.message.splitlines() == [
        f"{file}: 2 bad rows; fix them, or skip them (bad_rows: skip)",
        f"  {file}:2: key 'chosen' must be text, but is 3",
        f"  {file}:3: key 'rejected' must be text, but is true",
    ]


def test_many_bad_rows_are_counted_and_ten_are_named(tmp_path):
    with pytest.raises(DataError) as error:
        load("preferences", write(tmp_path, [PAIR] + [{**PAIR, "chosen": ""}] * 25))
    lines = error.value.message.splitlines()
    assert len(lines) == 12
    assert "25 bad rows" in lines[0] and lines[-1].strip() == "… and 15 more"


def test_bad_rows_are_skipped_and_counted_by_kind(tmp_path):
    file = write(tmp_path, [PAIR, {**PAIR, "chosen": ""}, {**PAIR, "chosen": 3}, {**PAIR, "chosen": " "}])
    loaded = load("preferences", file, bad_rows="skip")
    assert [row.source for row in loaded.rows] == [f"{file}:1"]
    assert loaded.refused_kinds == {"empty_reply": 2, "bad_row": 1}
    assert loaded.refused[0] == f"{file}:2: key 'chosen' is an empty reply"


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match="no usable row"):
        load("preferences", write(tmp_path, [{**PAIR, "chosen": ""}]), bad_rows="skip")


def test_broken_json_line_is_a_bad_row(tmp_path):
    file = write(tmp_path, [PAIR])
    file.write_text(file.read_text() + '{"prompt": \n')
    with pytest.raises(DataError, match=r"x.jsonl:2: not JSON"):
        load("preferences", file)
    assert len(load("preferences", file, bad_rows="skip").rows) == 1


def test_a_pair_is_also_a_demonstration_and_a_prompt(tmp_path):
    file, hi = write(tmp_path, [PAIR]), Message("user", "Hi")
    source = f"{file}:1"
    assert load("demonstrations", file).rows == [Demonstration((hi, Message("assistant", "Hello!")), "helpful", source)]
    others = {"chosen": "Hello!", "rejected": "What?"}
    assert load("prompts", file).rows == [Prompt((hi,), "helpful", source, others)]


def test_pairs_of_one_row_hold_one_prompt(tmp_path):
    file = write(tmp_path, [{"instruction": "Hi", "output": ["a", "b", "c"]}])
    assert len(load("preferences", file).rows) == 3
    assert len(load("prompts", file).rows) == 1


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("preferences", {"instruction": "Hi", "output": "Hello!"}, "x.jsonl:1: no pair of answers here"),
        ("preferences", {"prompt": "Hi"}, "x.jsonl:1: no pair of answers here"),
        ("demonstrations", {"prompt": "Hi"}, "x.jsonl:1: a prompt without an answer"),
    ],
)
def test_a_file_that_holds_less_than_asked_for(tmp_path, kind, row, message):
    with pytest.raises(DataError, match=message):
        load(kind, write(tmp_path, [row]))


@pytest.mark.parametrize(
    ("kind", "rows", "reason"),
    [
        ("demonstrations", [{"messages": TURNS}, {"messages": TURNS[:1]}], "a prompt without an answer"),
        ("preferences", [PAIR, {"prompt": "Hi", "chosen": "Hello!"}], "'rejected' is missing"),
        ("preferences", [{"prompt": "Hi", "chosen": "Hello!"}, PAIR, PAIR], "'rejected' is missing"),
        ("preferences", [PAIR, {**PAIR, "chosen": "half \ud83d"}], r"holds a lone surrogate \(\\ud83d\)"),
        ("prompts", [PAIR, {**PAIR, "prompt": "half \ud83d"}], r"holds a lone surrogate \(\\ud83d\)"),
        ("preferences", [GRADED, {**GRADED, "response": 7}, {**GRADED, "helpfulness": 1}], "'response' must be text"),
        ("preferences", [{**PAIR, "strength": 1}, {**PAIR, "strength": float("inf")}], "'strength' must be a number"),
    ],
)
def test_any_bad_row_can_be_skipped(tmp_path, kind, rows, reason):
    file = write(tmp_path, rows)
    with pytest.raises(DataError, match=f"1 bad rows.*\n.*{reason}"):
        load(kind, file)
    loaded = load(kind, file, bad_rows="skip")
    assert len(loaded.refused) == 1 and loaded.rows


@pytest.mark.parametrize(
    ("table", "kind", "rating"),
    [
        ("prompt,chosen,rejected,strength\n42,7,8,2\n", "preferences", "better"),
        ("prompt;chosen;rejected;strength\n42;7;8;\n", "preferences", "unrated"),
        ("prompt,chosen,rejected,score_chosen,score_rejected\n42,7,8,9.0,7.5\n", "preferences", "slightly"),
        ("prompt,response,helpfulness\n42,7,4\n42,8,1\n", "preferences", "significantly"),
        ("instruction,input,output,history\n42,,7,[]\n", "demonstrations", None),
        ("instruction,output,history\n42,7,\n", "demonstrations", None),
        (
            'messages\n"[{""role"": ""user"", ""content"": ""42""}, {""role"": ""assistant"", ""content"": ""7""}]"\n',
            "demonstrations",
            None,
        ),
    ],
)
def test_numbers_and_lists_in_cells(tmp_path, table, kind, rating):
    (tmp_path / "x.csv").write_text(table)
    (read,) = load(kind, tmp_path / "x.csv").rows
    assert reward_data.prompt_of(read) == (Message("user", "42"),)
    assert getattr(read, "rating", None) == rating
    assert (read.chosen if rating else read.messages[-1].content) == "7"


def test_the_tag_is_for_rows_that_bring_none(tmp_path):
    tagged = {"messages": [{"role": "user", "content": "Hi"}], "tag": "helpful"}
    assert load("prompts", Source(write(tmp_path, [tagged]), tag="safety")).rows[0].tag == "helpful"
    assert load("prompts", Source(write(tmp_path, [PAIR]), tag="safety")).rows[0].tag == "safety"
    assert load("prompts", write(tmp_path, [PAIR])).rows[0].tag == "helpful"


def test_a_named_format_overrides_what_the_keys_say(tmp_path):
    assert (
        load("prompts", Source(write(tmp_path, [PAIR | {"rejected": 5}]), format="prompts")).rows[0].messages[0].content
        == "Hi"
    )


def test_limit_keeps_the_first_records_and_reads_no_further(tmp_path):
    file = write(tmp_path, [PAIR, {**PAIR, "prompt": "Bye"}, {**PAIR, "chosen": 3}])
    assert [row.prompt[0].content for row in load("preferences", Source(file, limit=2)).rows] == ["Hi", "Bye"]


def test_every_file_of_a_folder_has_its_own_form(tmp_path):
    write(tmp_path, [PAIR], "a.jsonl")
    write(
        tmp_path, [{"chosen": "\n\nHuman: Yo\n\nAssistant: b", "rejected": "\n\nHuman: Yo\n\nAssistant: c"}], "b.jsonl"
    )
    loaded = load("preferences", tmp_path)
    assert [row.prompt[0].content for row in loaded.rows] == ["Hi", "Yo"]
    assert loaded.files == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


class TestSelect:
    def rows(self, tmp_path):
        return write(tmp_path, [{"prompt": str(n)} for n in range(4)])

    def selection(self, tmp_path, content):
        (tmp_path / "split.txt").write_text(json.dumps(content))
        return tmp_path / "split.txt"

    def test_row_numbers_count_from_zero(self, tmp_path):
        chosen = self.selection(tmp_path, {"train": [3, 0]})
        loaded = load("prompts", Source(self.rows(tmp_path), select=(chosen, "train")))
        assert [row.messages[0].content for row in loaded.rows] == ["0", "3"]
        assert loaded.files[-1] == str(chosen)

    def test_bad_rows_outside_the_selection_do_not_matter(self, tmp_path):
        file = write(tmp_path, [PAIR, {**PAIR, "chosen": ""}, PAIR])
        chosen = self.selection(tmp_path, {"train": [0, 2]})
        assert len(load("preferences", Source(file, select=(chosen, "train"))).rows) == 2

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"train": [4]}, "selects row 4, but there are only rows 0 to 3"),
            ({"train": [-1]}, "selects row -1"),
            ({"test": [0]}, "has no key 'train'"),
            ({"train": ["0"]}, "'train' must be a list of row numbers"),
            ({"train": [True]}, "'train' must be a list of row numbers"),
            ([0], "has no key 'train'"),
        ],
    )
    def test_wrong_selection(self, tmp_path, content, message):
        with pytest.raises(DataError, match=message):
            load("prompts", Source(self.rows(tmp_path), select=(self.selection(tmp_path, content), "train")))

    def test_missing_selection(self, tmp_path):
        with pytest.raises(DataError, match="no.json: cannot be read: No such file"):
            load("prompts", Source(self.rows(tmp_path), select=(tmp_path / "no.json", "train")))


class TestHub:
    """The `datasets` library is replaced: tests use no network."""

    def hub(self, monkeypatch, load_dataset):
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    def test_reads_the_named_split(self, monkeypatch):
        asked = []
        self.hub(monkeypatch, lambda name, split: asked.append((name, split)) or [PAIR])
        loaded = load("preferences", Source("owner/pairs", split="test"))
        assert asked == [("owner/pairs", "test")]
        assert [row.source for row in loaded.rows] == ["owner/pairs[test]:1"]
        assert len(loaded.digest) == 64 and loaded.files == ["owner/pairs"]

    def test_failure_is_one_message(self, monkeypatch):
        def offline(name, split):
            raise ConnectionError("cannot reach the hub\nlong story")

        self.hub(monkeypatch, offline)
        with pytest.raises(
            DataError, match=r"^owner/pairs: no such file, and no hub data set .*: cannot reach the hub$"
        ):
            load("preferences", "owner/pairs")


def test_split_of_a_local_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="split 'test' is for shipped data, hub data sets and folders"):
        load("prompts", Source(write(tmp_path, [PAIR]), split="test"))


def test_digest_is_that_of_the_file(tmp_path):
    file = write(tmp_path, [PAIR])
    assert load("prompts", file).digest == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("kind", "record", "train", "held_out"),
    [
        ("demonstrations", Demonstration, 1500, 200),
        ("preferences", Preference, 2000, 400),
        ("prompts", Prompt, 600, 256),
    ],
)
def test_shipped_data(kind, record, train, held_out):
    one, other = load(kind, "shipped"), load(kind, Source("shipped", split="held_out"))
    assert len(one.rows) >= train and len(other.rows) >= held_out
    assert {type(row) for row in one.rows + other.rows} == {record}
    assert reward_data.check(one.rows, other.rows) == []


def test_shipped_data_has_no_other_split():
    with pytest.raises(DataError, match="the splits train and held_out, not 'test'"):
        load("prompts", Source("shipped", split="test"))
