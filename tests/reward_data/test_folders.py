"""Which files of a folder are read: those of the split, never hidden ones, and what is left out is told."""

from __future__ import annotations

import json

import pytest

from reward_data import DataError, Source, load


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name}) + "\n")


def read(folder, **asked):
    loaded = load("prompts", Source(folder, **asked))
    return sorted(row.messages[0].content for row in loaded.rows), " ".join(loaded.findings)


@pytest.mark.parametrize(
    "other",
    ["test.jsonl", "data/test-00000-of-00001.jsonl", "validation/a.jsonl", "held_out.jsonl", "test/train.jsonl"],
)
def test_only_train_is_read_unless_asked(tmp_path, other):
    write(tmp_path, "data/train.jsonl", "contest.jsonl", other)
    names, told = read(tmp_path)
    assert names == ["contest.jsonl", "data/train.jsonl"]
    assert other in told and "contest" not in told


def test_split_chooses(tmp_path):
    write(tmp_path, "train.jsonl", "val.jsonl", "test_sft-00000-of-00002.jsonl", "test_prefs.jsonl")
    assert read(tmp_path, split="validation")[0] == ["val.jsonl"]
    assert read(tmp_path, split="test_prefs")[0] == ["test_prefs.jsonl"]
    assert read(tmp_path, split="test")[0] == ["test_prefs.jsonl", "test_sft-00000-of-00002.jsonl"]
    with pytest.raises(DataError, match="no file of split 'held_out'; splits that its files name: test, train, valid"):
        read(tmp_path, split="held_out")


def test_a_folder_of_tests_alone_is_refused(tmp_path):
    write(tmp_path, "test.jsonl")
    with pytest.raises(DataError, match="no file to train on; splits that its files name: test; choose one with"):
        read(tmp_path)


def test_hidden_and_metadata_files_are_no_rows_and_others_are_named(tmp_path):
    write(tmp_path, "a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/a.jsonl", "dataset_infos.json")
    write(tmp_path, "B.JSONL", "notes.txt", "README.md", "LICENSE")
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path)
    names, told = read(tmp_path)
    assert names == ["B.JSONL", "a.jsonl"]
    assert told.endswith("2 files ignored: again.jsonl, notes.txt")


def test_config_is_a_folder_in_it(tmp_path):
    write(tmp_path, "one/train.jsonl", "two/train.jsonl")
    assert read(tmp_path, config="two")[0] == ["two/train.jsonl"]


def test_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both")[0] == ["train"]
    assert read(tmp_path / "both", split="test")[0] == ["test"]
    assert read(tmp_path / "both" / "test")[0] == ["test"]
