"""Alpaca: `instruction`, an optional `input`, `output`; with LLaMA-Factory's `system` and `history`.

Also self-instruct's seed tasks (arXiv 2212.10560): `instruction` with `instances`, a list of {input, output}.
"""

from __future__ import annotations

from typing import Any

from reward_data.converters.fields import field, question, reply, shown
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Demonstration, Message, Record, Tag


def matches(value: Any) -> bool:
    return isinstance(value, dict) and "instruction" in value and ("output" in value or "instances" in value)


def convert(row: Row, tag: Tag) -> list[Record]:
    if "instances" not in row.value:
        return [_demonstration(row.value, tag, row.place)]
    instances = field(row.value, "instances")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise BadRow(f"key 'instances' must be a list of objects, but is {shown(instances)}")
    return [_demonstration({**row.value, **instance}, tag, row.place) for instance in instances]


def _demonstration(value: dict[str, Any], tag: Tag, place: str) -> Demonstration:
    return Demonstration((*question(value), Message("assistant", reply(value, "output"))), tag, place)
