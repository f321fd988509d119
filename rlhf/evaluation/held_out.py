"""`held_out.jsonl` of an artifact: what its stage measured on each held-out prompt or pair, without the texts.

Two runs that measured the same items are compared item by item.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "held_out.jsonl"
ITEM, PROMPT = "item", "prompt"
Row = Mapping[str, Any]
"""`item` and `prompt`: digests of what was measured and of its prompt, which is the cluster; then values by metric."""


def rows_of(
    texts: Sequence[str], prompts: Sequence[str], values: Mapping[str, Sequence[float | None]]
) -> list[dict[str, Any]]:
    """A row per item. `texts` is what makes an item: the same text again is another item. None: not measured."""
    again: Counter[str] = Counter()
    rows = []
    for n, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        again[text] += 1
        known = {name: column[n] for name, column in values.items() if column[n] is not None}
        rows.append({ITEM: _digest(f"{again[text]} {text}"), PROMPT: _digest(prompt), **known})
    return rows


def write(folder: Path, rows: Iterable[Row]) -> None:
    lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the file; none where there is no file, as in artifacts of earlier versions."""
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else []


def parse(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
