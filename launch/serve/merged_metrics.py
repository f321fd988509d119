"""The metrics of several processes as one text for Prometheus."""

from __future__ import annotations

import re
from collections.abc import Mapping

SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (.+)")


def merged(texts: Mapping[str, str]) -> str:
    """`texts`: by replica, which becomes a label of each sample."""
    families: dict[str, dict[str, None]] = {}  # its lines, without those that are there already, in this order
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):  # HELP and TYPE
                family = line.split(" ")[2]
            families.setdefault(family, {})[line if line.startswith("#") else _labelled(line, replica)] = None
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _labelled(line: str, replica: str) -> str:
    match = SAMPLE.fullmatch(line)
    assert match, line
    name, labels, value = match.groups()
    return f'{name}{{{labels + "," if labels else ""}replica="{replica}"}} {value}'
