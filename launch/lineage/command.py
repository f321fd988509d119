"""Prints what a model was made from, back to the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf.errors import UserError
from rlhf.runs import artifacts
from rlhf.runs.lineage import Node, trace
from rlhf.tracking import Registry, Version, is_reference

BROKEN = 4


def lineage(model: str, tracking_uri: str) -> int:
    """`model`: a folder of a run or artifact, or `models:/NAME@ALIAS`. The exit code: 4 if something is missing or
    changed.
    """
    node = _registered(model, Registry(tracking_uri)) if is_reference(model) else trace(artifact_folder(model))
    print("\n".join(lines(node)))
    faults = list(node.faults())
    print("\n".join(faults) or "Everything is there and as it was.")
    return BROKEN if faults else 0


def artifact_folder(model: str) -> Path:
    folder = Path(model).expanduser()
    return folder / "artifact" if (folder / "artifact").is_dir() else folder


def lines(node: Node) -> Iterator[str]:
    """The tree: each artifact with its parents once, later only by its name and digest."""
    yield from _lines(node, "", "", set())


def _lines(node: Node, first: str, rest: str, shown: set[tuple[str, str]]) -> Iterator[str]:
    """`first` stands before the first line, `rest` before the others."""
    known = (node.name, node.digest) in shown
    shown.add((node.name, node.digest))
    title = f"{first}{node.name} {node.digest[:12]}".rstrip()
    if known and node.parents:
        yield f"{title} (above)"
        return
    yield title + (f" {node.fault.partition(':')[0].upper()}" if node.fault else "")
    bar = "│   " if node.parents else "    "
    for name, value in [*([("in", str(node.path))] if node.path else []), *node.facts.items()]:
        yield f"{rest}{bar}{name} {value}"
    for parent in node.parents:
        last = parent is node.parents[-1]
        yield from _lines(parent, rest + ("└── " if last else "├── "), rest + ("    " if last else "│   "), shown)


def _registered(reference: str, registry: Registry) -> Node:
    """From the folder of a version, or, where that is gone, from what the registry knows of it."""
    version = registry.version(reference)
    try:
        there = artifacts.load(version.path, sizes=False)
    except UserError:
        return _recorded(version, registry, f"missing: {version.path} holds no complete artifact")
    if there.digest != version.digest:
        return _recorded(version, registry, f"changed: {version.path} now holds {there.digest[:12]}")
    return trace(version.path)


def _recorded(version: Version, registry: Registry, fault: str) -> Node:
    tags = version.tags
    facts = {"revision": tags.get("git.revision", ""), "settings": tags.get("config.digest", "")[:12]}
    node = Node(tags.get("artifact.kind", version.name), version.digest, version.path, facts, fault)
    for key, value in tags.items():
        kind, _, name = key.partition(".")
        if kind == "input":
            reference, _, digest = value.rpartition(" ")
            node.parents.append(_registered(reference, registry) if reference else Node(name, digest))
        elif kind == "data":
            node.parents.append(Node(name, value))
    return node
