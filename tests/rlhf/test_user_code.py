"""Objects that the settings name, in modules and in files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from types import ModuleType

import pytest

from rlhf.errors import UserError
from rlhf.user_code import load_object, source_digest

FILE = """
from __future__ import annotations
from dataclasses import dataclass, field

COUNT = [0]
COUNT[0] += 1

@dataclass(frozen=True)
class Judge:
    weights: list[float] = field(default_factory=list)

    def __call__(self, responses):
        return [COUNT[0] for _ in responses]

judge = Judge([1.0])
_hidden = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my judge.py"
    path.write_text(FILE)
    return path


def test_a_name_in_a_module():
    assert load_object("math:floor", "x") is math.floor
    assert load_object("os.path:join", "x")("a", "b") == "a/b"


def test_a_name_in_a_file_with_dataclasses(file):
    judge = load_object(f"{file}:judge", "x")
    assert judge.weights == [1.0] and judge(["a", "b"]) == [1, 1]


def test_a_file_is_one_module_however_often_it_is_named(file):
    judge, again, cls = (load_object(f"{file}:{name}", "x") for name in ("judge", "judge", "Judge"))
    assert judge is again and type(judge) is cls
    assert judge([""]) == [1]  # it was run once


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "reward.py").write_text(f"VALUE = {value}")
    assert [load_object(f"{tmp_path / folder}/reward.py:VALUE", "x") for folder in "ab"] == [1, 2]


def test_a_file_that_changed_is_read_again(file, monkeypatch):
    """In a notebook."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = load_object(f"{file}:judge", "x")
    changed = file.stat()
    file.write_text(FILE.replace("Judge([1.0])", "Judge([2.0])"))
    os.utime(
        file, ns=(changed.st_atime_ns, changed.st_mtime_ns)
    )  # of the same second and size, as cached bytecode notes
    assert (before.weights, load_object(f"{file}:judge", "x").weights) == ([1.0], [2.0])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("no_such_module:f", r"^ppo\.advantage: no_such_module cannot be imported: ModuleNotFoundError: "),
        ("/no/such/file.py:f", r"^ppo\.advantage: /no/such/file\.py cannot be imported: FileNotFoundError: "),
        ("math:flor", r"^ppo\.advantage: math has no 'flor'; it has .*floor"),
    ],
)
def test_what_is_not_there_is_named_with_its_setting(code, message):
    with pytest.raises(UserError, match=message) as caught:
        load_object(code, "ppo.advantage")
    assert caught.value.exit_code == 2


def test_a_missing_name_lists_those_that_there_are(file):
    with pytest.raises(UserError, match=r"has no 'jugde'; it has COUNT, Judge, .*judge$") as caught:
        load_object(f"{file}:jugde", "x")
    assert "_hidden" not in caught.value.message


def test_a_file_that_fails_can_be_mended(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("import torch\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"reward\.py cannot be imported: ZeroDivisionError: division by zero$"):
            load_object(f"{path}:VALUE", "x")
    path.write_text("VALUE = 'mended, and of another length'\n")
    assert load_object(f"{path}:VALUE", "x") == "mended, and of another length"


def test_a_digest_is_of_the_file_that_holds_the_code(file):
    assert source_digest(f"{file}:judge") == hashlib.sha256(FILE.encode()).hexdigest()
    own = json.__file__
    with open(own, "rb") as stream:
        assert source_digest("json:loads") == hashlib.sha256(stream.read()).hexdigest()


@pytest.mark.parametrize(
    "code", ["sys:path", "/no/such/file.py:f", "no_such_module:f", "no_such_package.module:f", "of_a_notebook:f"]
)
def test_code_in_no_file_has_no_digest(code, monkeypatch):
    monkeypatch.setitem(sys.modules, "of_a_notebook", ModuleType("of_a_notebook"))
    assert source_digest(code) == ""
