"""YAML in which every value knows its file and line, so that a mistake can be shown there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Keys = tuple[str | int, ...]

MOST_VALUES = 100_000


@dataclass(frozen=True)
class Node:
    value: Any  # dict[str, Node], list[Node] or a plain scalar
    where: str  # "configs/run/quickstart.yaml:12" or "command line"


@dataclass(frozen=True)
class ConfigError:
    where: str
    name: str  # dotted name of the setting, "" for a whole file
    text: str


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: `1e-6` is a number; `no`, `on`, `1:30`, `010` and dates are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read(path: Path, shown: str) -> tuple[Node, list[ConfigError]]:
    """The tree of a YAML file; an empty mapping if it cannot be read. `shown` names it in messages."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not text" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        return Node({}, shown), [ConfigError(shown, "", reason)]
    tree, mistakes = parse(text, shown)
    if tree.value is None:
        return Node({}, f"{shown}:1"), mistakes
    if not isinstance(tree.value, dict):
        return Node({}, shown), [*mistakes, ConfigError(f"{shown}:1", "", "must be a mapping of `name: value` lines")]
    return tree, mistakes


def parse(text: str, shown: str, *, lines: bool = True) -> tuple[Node, list[ConfigError]]:
    """The tree of one YAML document. Without `lines` the place of every value is `shown`."""
    loader = _Loader(text)
    mistakes: list[ConfigError] = []

    def place(node: yaml.Node) -> str:
        return f"{shown}:{node.start_mark.line + 1}" if lines else shown

    def convert(node: yaml.Node, where: str, name: str) -> Node:
        if isinstance(node, yaml.MappingNode):
            return Node(mapping(node, name), where)
        if isinstance(node, yaml.SequenceNode):
            return Node([convert(item, place(item), f"{name}[{i}]") for i, item in enumerate(node.value)], where)
        return Node(loader.construct_object(node), where)

    def mapping(node: yaml.MappingNode, name: str) -> dict[str, Node]:
        prefix = f"{name}." if name else ""
        places: dict[str, str] = {}
        for key_node, _ in node.value:
            key, where = str(key_node.value), place(key_node)
            if key in places:
                mistakes.append(ConfigError(where, prefix + key, f"is given twice; first at {places[key]}"))
            places[key] = where
        loader.flatten_mapping(node)  # inserts what `<<: *anchor` refers to before the mapping's own entries
        return {str(key.value): convert(value, place(key), f"{prefix}{key.value}") for key, value in node.value}

    try:
        root = loader.get_single_node()
        if root and (fault := _too_much(root)):
            return Node({}, shown), [ConfigError(shown, "", fault)]
        tree = convert(root, place(root), "") if root else Node(None, f"{shown}:1" if lines else shown)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown}:{mark.line + 1}" if mark and lines else shown
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        return Node({}, where), [*mistakes, ConfigError(where, "", f"is not valid YAML: {problem}")]
    except RecursionError:
        return Node({}, shown), [ConfigError(shown, "", "is nested too deeply")]
    finally:
        loader.dispose()
    return tree, mistakes


def _too_much(root: yaml.Node) -> str:
    """Why the document has no tree of a reasonable size, "" if it has: a few aliases of aliases make billions of values."""
    sizes: dict[int, int] = {}  # 0: still being counted

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            children = [child for part in parts for child in (part if isinstance(part, tuple) else [part])]
            sizes[id(node)] = 1 + sum(map(size, children))
        elif sizes[id(node)] == 0:
            raise _Cycle
        return sizes[id(node)]

    try:
        count = size(root)
    except _Cycle:
        return "has an alias that holds itself"
    return f"has {count:,} values with its aliases; {MOST_VALUES:,} are the most" if count > MOST_VALUES else ""


class _Cycle(Exception):
    """An alias inside of what it stands for."""


def constant(value: Any) -> Node:
    """The tree of values that are in no file."""
    if isinstance(value, dict):
        value = {key: constant(item) for key, item in value.items()}
    elif isinstance(value, list):
        value = [constant(item) for item in value]
    return Node(value, "default")


def merge(base: Node, over: Node) -> Node:
    """Mappings merge key by key; anything else of `over` replaces what `base` has."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, over.where)


def put(tree: Node, keys: Keys, leaf: Node) -> Node:
    """`tree` with `leaf` at `keys`; a number in `keys` is the index of an existing list entry."""
    if not keys:
        return leaf
    key, rest = keys[0], keys[1:]
    if isinstance(tree.value, list) and str(key).isdigit() and int(key) < len(tree.value):
        items = list(tree.value)
        items[int(key)] = put(items[int(key)], rest, leaf)
        return Node(items, tree.where)
    entries = dict(tree.value) if isinstance(tree.value, dict) else {}
    entries[str(key)] = put(entries.get(str(key), Node({}, leaf.where)), rest, leaf)
    return Node(entries, tree.where)


def drop(tree: Node, keys: Keys) -> Node:
    """`tree` without the value at `keys`, if there is one."""
    child = _child(tree, keys[0]) if keys else None
    if child is None:
        return tree
    if isinstance(tree.value, list):
        index = int(keys[0])
        items = list(tree.value)
        items[index : index + 1] = [drop(child, keys[1:])] if keys[1:] else []
        return Node(items, tree.where)
    entries = dict(tree.value)
    if keys[1:]:
        entries[keys[0]] = drop(child, keys[1:])
    else:
        del entries[keys[0]]
    return Node(entries, tree.where)


def plain(tree: Node) -> Any:
    """The values without their places."""
    if isinstance(tree.value, dict):
        return {key: plain(node) for key, node in tree.value.items()}
    if isinstance(tree.value, list):
        return [plain(node) for node in tree.value]
    return tree.value


def find(tree: Node, keys: Keys) -> Node | None:
    """The value at `keys`, or None."""
    node: Node | None = tree
    for key in keys:
        node = _child(node, key) if node else None
    return node


def where(tree: Node, keys: Keys) -> str:
    """The place of the value at `keys`, or of the innermost value around it that has one."""
    child = _child(tree, keys[0]) if keys else None
    return tree.where if child is None else where(child, keys[1:])


def _child(tree: Node, key: str | int) -> Node | None:
    if isinstance(tree.value, dict):
        return tree.value.get(key)
    if isinstance(tree.value, list) and str(key).isdigit() and int(key) < len(tree.value):
        return tree.value[int(key)]
    return None
