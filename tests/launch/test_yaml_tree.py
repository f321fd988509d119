from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch.yaml_tree import Node, drop, find, merge, parse, plain, put, read, where


def tree(text: str) -> Node:
    node, mistakes = parse(text, "a.yaml")
    assert mistakes == []
    return node


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("-3", -3),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("010", "010"),
        ("'1e-6'", "1e-6"),
        ("e5", "e5"),
        ("[1, a]", [1, "a"]),
        ("ray://head:10001", "ray://head:10001"),
    ],
)
def test_scalars_are_read_as_in_yaml_1_2(text: str, value: object) -> None:
    found = plain(tree(f"x: {text}"))["x"]
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False))
def test_every_number_that_python_writes_is_a_number(number: float) -> None:
    text = f"{number!r}" if math.isfinite(number) else f"{'-' if number < 0 else ''}.inf"
    assert plain(tree(f"x: {text}")) == {"x": number}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1), values, max_size=3))
def test_what_pyyaml_writes_is_read_back(value: dict) -> None:
    assert plain(tree(yaml.safe_dump(value, allow_unicode=True))) == value


def test_every_value_knows_its_line() -> None:
    node = tree("a: 1\nb:\n  c:\n  - d\n  - e: 5\n")
    assert where(node, ("a",)) == "a.yaml:1"
    assert where(node, ("b", "c")) == "a.yaml:3"
    assert where(node, ("b", "c", 1, "e")) == "a.yaml:5"


def test_an_absent_value_is_placed_where_it_is_missing() -> None:
    assert where(tree("a: 1\nb:\n  c: 2\n"), ("b", "x", "y")) == "a.yaml:2"


def test_a_key_given_twice_is_a_mistake_at_its_second_line() -> None:
    _, mistakes = parse("a:\n  b: 1\n  b: 2\n", "a.yaml")
    assert [(m.where, m.name) for m in mistakes] == [("a.yaml:3", "a.b")]


def test_an_anchor_is_merged() -> None:
    assert plain(tree("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n"))["d"] == {"b": 1, "c": 3}


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\tx: 1", "a: *unknown", "a: !!python/name:os.system x", "a: 1\n---\nb: 2"]
)
def test_broken_yaml_is_one_mistake_with_its_line(text: str) -> None:
    _, mistakes = parse(text, "a.yaml")
    assert len(mistakes) == 1
    assert mistakes[0].where.startswith("a.yaml")
    assert "is not valid YAML" in mistakes[0].text


@pytest.mark.parametrize(("content", "reason"), [(b"\xff\xfe\x00", "is not text"), (b"- 1\n", "must be a mapping")])
def test_a_file_that_is_no_mapping_is_a_mistake(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    node, mistakes = read(path, "a.yaml")
    assert node.value == {}
    assert [reason in mistake.text for mistake in mistakes] == [True]


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n")
    node, mistakes = read(tmp_path / "a.yaml", "a.yaml")
    assert (node.value, mistakes) == ({}, [])


def test_merging_goes_into_mappings_and_replaces_the_rest() -> None:
    base, over = tree("a: {b: 1, c: [1, 2], d: {e: 1}, f: 0}\nx: 1"), tree("a: {c: [3], d: null, f: 9}\ny: 2")
    assert plain(merge(base, over)) == {"a": {"b": 1, "c": [3], "d": None, "f": 9}, "x": 1, "y": 2}


def test_put_reaches_into_lists_and_through_what_is_no_mapping() -> None:
    node = tree("a: [{b: 1}, {b: 2}]\nc: null")
    node = put(put(node, ("a", "1", "b"), Node(9, "here")), ("c", "d"), Node(7, "here"))
    assert plain(node) == {"a": [{"b": 1}, {"b": 9}], "c": {"d": 7}}
    assert where(node, ("a", 1, "b")) == "here"


def test_drop_and_find() -> None:
    node = tree("a: [{b: 1}, 2]\nc: 3")
    assert plain(drop(node, ("a", 0, "b"))) == {"a": [{}, 2], "c": 3}
    assert plain(drop(node, ("a", 1))) == {"a": [{"b": 1}], "c": 3}
    assert drop(node, ("no", "such")) == node
    assert find(node, ("a", 0, "b")) == Node(1, "a.yaml:1")
    assert find(node, ("c", "d")) is None


LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "values with its aliases; 100,000 are the most"),
        (MERGES, "values with its aliases; 100,000 are the most"),
        ("a: &a [1, *a]", "has an alias that holds itself"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bomb_is_one_mistake(text: str, reason: str) -> None:
    _, mistakes = parse(text, "run.yaml")
    assert [(one.where, reason in one.text) for one in mistakes] == [("run.yaml", True)]
