"""An artifact is whole or it is not there."""

import hashlib
import json
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import UserError
from rlhf.runs import artifacts

PARENTS = {"base": "aaa"}


def made(folder: Path) -> artifacts.Artifact:
    artifacts.begin(folder)
    (folder / "nested").mkdir()
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "nested" / "tokens.txt").write_text("a b")
    return artifacts.complete(folder, "sft", PARENTS, "settings", {"loss": 0.5})


def test_load_returns_what_was_completed(tmp_path):
    finished = made(tmp_path / "a")
    assert artifacts.load(tmp_path / "a", verify=True) == finished
    assert finished.metrics == {"loss": 0.5}


def test_manifest_holds_sha256_and_size_of_every_file(tmp_path):
    made(tmp_path / "a")
    files = json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    assert files == {
        "model.bin": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
        "nested/tokens.txt": {"size": 3, "sha256": hashlib.sha256(b"a b").hexdigest()},
    }


def test_digest_depends_on_content_and_not_on_place(tmp_path):
    first, second = made(tmp_path / "a"), made(tmp_path / "b")
    assert first.digest == second.digest
    (tmp_path / "b" / "model.bin").write_bytes(b"other")
    assert artifacts.complete(tmp_path / "b", "sft", PARENTS, "settings", {}).digest != first.digest


def test_a_moved_artifact_still_loads(tmp_path):
    finished = made(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert artifacts.load(tmp_path / "b").digest == finished.digest


def test_find_returns_the_artifact_of_the_same_settings_and_parents(tmp_path):
    finished = made(tmp_path / "a")
    assert artifacts.find(tmp_path / "a", "settings", PARENTS) == finished


@pytest.mark.parametrize(
    ("config_digest", "parents"), [("other", PARENTS), ("settings", {"base": "bbb"}), ("settings", {})]
)
def test_find_is_none_when_settings_or_a_parent_differ(tmp_path, config_digest, parents):
    made(tmp_path / "a")
    assert artifacts.find(tmp_path / "a", config_digest, parents) is None


def test_find_is_none_where_nothing_is(tmp_path):
    assert artifacts.find(tmp_path / "a", "settings", PARENTS) is None


def test_files_without_a_manifest_are_no_artifact(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"weights")
    assert artifacts.find(tmp_path, "settings", {}) is None
    with pytest.raises(UserError, match=r"no complete artifact") as caught:
        artifacts.load(tmp_path)
    assert caught.value.exit_code == 4


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(b"w")


@pytest.mark.parametrize(("damage", "fault"), [(remove, "is missing"), (cut, "has 1 bytes instead of 7")])
def test_a_torn_artifact_names_the_file(tmp_path, damage, fault):
    made(tmp_path / "a")
    damage(tmp_path / "a" / "model.bin")
    for read in (artifacts.load, lambda folder: artifacts.find(folder, "settings", PARENTS)):
        with pytest.raises(UserError, match=f"model.bin {fault}") as caught:
            read(tmp_path / "a")
        assert caught.value.exit_code == 4


def test_verify_sees_changed_bytes_of_the_same_length(tmp_path):
    made(tmp_path / "a")
    (tmp_path / "a" / "model.bin").write_bytes(b"WEIGHTS")
    artifacts.load(tmp_path / "a")
    with pytest.raises(UserError, match="model.bin has other content"):
        artifacts.load(tmp_path / "a", verify=True)


def test_ranks_share_the_files_to_hash(tmp_path):
    folder = artifacts.begin(tmp_path / "a")
    for name in ("a", "b", "c"):
        (folder / name).write_text(name)
    artifacts.complete(folder, "sft", PARENTS, "settings", {})
    (folder / "b").write_text("B")
    artifacts.load(folder, verify=True, part=(0, 2))
    with pytest.raises(UserError, match="b has other content"):
        artifacts.load(folder, verify=True, part=(1, 2))


def test_verify_sees_digests_that_were_edited_with_the_file(tmp_path):
    made(tmp_path / "a")
    (tmp_path / "a/model.bin").write_bytes(b"WEIGHTS")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    manifest["files"]["model.bin"]["sha256"] = hashlib.sha256(b"WEIGHTS").hexdigest()
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json has other content"):
        artifacts.load(tmp_path / "a", verify=True)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json"])
def test_a_broken_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not the manifest") as caught:
        artifacts.load(tmp_path)
    assert caught.value.exit_code == 4


def test_begin_leaves_nothing_of_the_older_artifact(tmp_path):
    made(tmp_path / "a")
    artifacts.begin(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_an_empty_folder_cannot_be_completed(tmp_path):
    with pytest.raises(UserError, match="no files"):
        artifacts.complete(artifacts.begin(tmp_path / "a"), "sft", {}, "settings", {})


def test_require_disk_says_what_is_needed_and_what_is_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _: usage(10**12, 10**12, 2_000_000_000))
    artifacts.require_disk(tmp_path / "not" / "there", 1_999_999_999)
    with pytest.raises(UserError, match=r"5\.0 GB needed, 2\.0 GB free") as caught:
        artifacts.require_disk(tmp_path / "not" / "there", 5_000_000_000)
    assert caught.value.exit_code == 5


def test_a_full_disk_while_completing_leaves_no_manifest(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    folder = artifacts.begin(tmp_path / "a")
    (folder / "model.bin").write_bytes(b"weights")
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _: usage(1, 1, 0))
    with pytest.raises(UserError, match="Not enough disk"):
        artifacts.complete(folder, "sft", {}, "settings", {})
    assert [path.name for path in folder.iterdir()] == ["model.bin"]


def test_write_atomic_to_a_full_device_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file.json"
    target.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full") as caught:
        artifacts.write_atomic(target, "new")
    assert caught.value.exit_code == 5
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file.json", "old")]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_digest_does_not_depend_on_the_order_of_keys(value):
    assert artifacts.digest_of(value) == artifacts.digest_of(dict(reversed(value.items())))


@given(json_values, json_values)
def test_digest_is_equal_exactly_for_equal_json(first, second):
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (artifacts.digest_of(first) == artifacts.digest_of(second)) == same


def test_plain_makes_strict_json_of_odd_numbers():
    import numpy as np

    value = {"nan": float("nan"), "numpy": np.float32(0.5), "inf": np.float64("inf"), "path": Path("a"), 1: (2, True)}
    assert artifacts.plain(value) == {"nan": None, "numpy": 0.5, "inf": None, "path": "a", "1": [2, True]}


def test_outside_git_the_revision_is_the_version_of_the_package(monkeypatch):
    def no_git(*_):
        raise OSError("git is not installed")

    monkeypatch.setattr(artifacts, "_git", no_git)
    version = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["version"]
    assert artifacts.code_revision.__wrapped__() == f"rlhf-pipeline {version}"


def test_code_revision_is_the_commit_of_this_checkout():
    root = Path(artifacts.__file__).parent.parent
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("the code is not in a git checkout")
    assert artifacts.code_revision().removesuffix("+changes") == head.stdout.strip()


def test_import_is_light():
    code = "import sys, rlhf.runs.artifacts, rlhf.runs.context; print([m for m in ('torch', 'mlflow', 'ray') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
