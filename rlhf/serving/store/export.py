"""Votes as data for training: preferences and demonstrations in the project's own form, with where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_data.records import Message, normalised_prompt

HELD_OUT = "held_out"
OTHER = {"first": "second", "second": "first"}
BUCKETS = 1 << 32


@dataclass
class Exported:
    """The rows of each split by kind, and why votes are in none."""

    preferences: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"train": [], HELD_OUT: []})
    demonstrations: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"train": [], HELD_OUT: []})
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str, count: int = 1) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + count


def export(votes: Iterable[Any], exchanges: Mapping[str, Any], held_out: float) -> Exported:
    """`held_out`: the fraction of groups that is held out. Votes of one person, and votes on one prompt, are in one
    group, directly or through others, so that neither a person nor a prompt is on both sides.
    """
    found = Exported()
    rows: list[tuple[str, dict[str, Any], Any]] = []
    for vote in votes:
        made = _row(vote, exchanges)
        if isinstance(made, str):
            found.leave_out(made)
        else:
            rows.append((*made, vote))
    rows = _once(rows, found)
    groups = groups_of([(_person(vote), _prompt(row)) for _, row, vote in rows])
    for (kind, row, _), group in zip(rows, groups, strict=True):
        getattr(found, kind)[HELD_OUT if _fraction(group) < held_out else "train"].append(row)
    return found


def _row(vote: Any, exchanges: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | str:
    """(kind, row), or why there is none."""
    first = exchanges[vote.first]
    if first.kind != "chat":
        return "not a chat"
    if vote.second is None:
        if not vote.edit:
            return "a thumb or labels alone"
        turns = [*first.messages, {"role": "assistant", "content": vote.edit}]
        return "demonstrations", {"messages": turns, "tag": "helpful", "provenance": _provenance(vote, exchanges)}
    second = exchanges[vote.second]
    if second.messages != first.messages:
        return "two prompts"
    if first.response.strip() == second.response.strip():
        return "equal responses"
    if not (first.response.strip() and second.response.strip()):
        return "an empty response"  # which training would refuse
    return "preferences", _preference(vote, {"first": first, "second": second}, exchanges)


def _preference(vote: Any, shown: Mapping[str, Any], exchanges: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = shown[vote.chosen], shown[OTHER[vote.chosen]]
    safety = {place: _safety(vote.labels.get(place, [])) for place in shown}
    return {
        "prompt": list(chosen.messages),
        "chosen": chosen.response,
        "rejected": rejected.response,
        "rating": vote.rating,
        "tag": "safety" if "unsafe" in safety.values() else "helpful",
        "chosen_safety": safety[vote.chosen],
        "rejected_safety": safety[OTHER[vote.chosen]],
        "provenance": _provenance(vote, exchanges),
    }


def _safety(labels: Sequence[str]) -> str:
    return "unsafe" if "unsafe" in labels else "safe" if "safe" in labels else "unknown"


def _provenance(vote: Any, exchanges: Mapping[str, Any]) -> dict[str, Any]:
    """Whose vote on what of which model; the person is a hash, by which nobody is named."""
    shown = [exchanges[each] for each in (vote.first, vote.second) if each]
    return {
        "vote": vote.id,
        "voted": vote.created,
        "rater": None if vote.user is None else hashlib.sha256(vote.user.encode()).hexdigest()[:16],
        "chosen_place": vote.chosen,
        "responses": [{"id": each.id, "model": each.model, "digest": each.digest} for each in shown],
    }


def _once(rows: Iterable[tuple[str, dict[str, Any], Any]], found: Exported) -> list[tuple[str, dict[str, Any], Any]]:
    """The last vote of a person on the same thing counts; without a name each vote is somebody's own."""
    last: dict[Any, tuple[str, dict[str, Any], Any]] = {}
    for kind, row, vote in rows:
        person = vote.user if vote.user is not None else ("vote", vote.id)
        if kind == "preferences":
            about = (_prompt(row), *sorted((row["chosen"], row["rejected"])))
        else:
            about = (_prompt(row), row["messages"][-1]["content"])
        if last.pop((person, kind, about), None):
            found.leave_out("voted again")
        last[person, kind, about] = (kind, row, vote)
    return list(last.values())


def _person(vote: Any) -> Any:
    return ("person", vote.user) if vote.user is not None else ("vote", vote.id)


def _prompt(row: Mapping[str, Any]) -> str:
    turns = row["prompt"] if "prompt" in row else row["messages"][:-1]
    return normalised_prompt([Message(turn["role"], turn["content"]) for turn in turns])


def groups_of(keys: Sequence[tuple[Any, Any]]) -> list[str]:
    """A name for each pair of keys, the same for pairs that share one, directly or through others."""
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for left, right in keys:
        parent[root(left)] = root(right)
    names: dict[Any, str] = {}
    for _, prompt in keys:  # a name that does not depend on the order of the votes
        place = root(prompt)
        names[place] = min(names.get(place, prompt), prompt)
    return [names[root(prompt)] for _, prompt in keys]


def _fraction(group: str) -> float:
    """From 0 to 1, by the group's name alone: a later export keeps groups that have not grown where they were."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") / BUCKETS
