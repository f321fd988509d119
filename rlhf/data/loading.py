"""Reads the sources of a run from the user's files, and holds rows out of each kind of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import reward_data
from reward_data import DataError, Demonstration, Message, Preference, Prompt
from reward_data.files import is_hub_name
from rlhf.chat import ChatMessage, llama2
from rlhf.config import DataConfig, RoleConfig, RunConfig, SourceConfig
from rlhf.data.splitting import Split, hold_out, prompts_of, without_shared
from rlhf.errors import UserError

Validate = Callable[[Sequence[ChatMessage]], None]


def load_demonstrations(config: RunConfig, validate: Validate = llama2.validate) -> Split:
    """Demonstrations of the run. UserError (3) with file, line and reason for rows that cannot be used.

    `validate` raises UserError for messages that the chat format cannot hold.
    """
    return _load("demonstrations", config.data.demonstrations, config.data, validate)


def load_preferences(config: RunConfig, validate: Validate = llama2.validate) -> Split:
    """Preferences of the run, without safety pairs that prefer an unsafe response to a safe one (Llama 2, §3.2.1)."""
    split = _load("preferences", config.data.preferences, config.data, validate)
    train, held_out = ([row for row in rows if not _prefers_unsafe(row)] for rows in (split.train, split.held_out))
    dropped = len(split.train) + len(split.held_out) - len(train) - len(held_out)
    findings = (
        [f"preferences: {dropped} pairs left out that prefer an unsafe response to a safe one"] if dropped else []
    )
    return Split(train, held_out, split.digests, split.findings + findings)


def load_prompts(config: RunConfig, validate: Validate = llama2.validate) -> Split:
    """Prompts of the run."""
    return _load("prompts", config.data.prompts, config.data, validate)


def _prefers_unsafe(row: Preference) -> bool:
    return row.tag == "safety" and row.chosen_safety == "unsafe" and row.rejected_safety == "safe"


def _load(kind: Any, role: RoleConfig | None, data: DataConfig, validate: Validate) -> Split:
    if role is None:
        raise UserError(f"data.{kind} is missing: name a source to train on", 3)
    train, digests, findings = _read(kind, role.train, data, validate)
    if role.held_out:
        held_out, more_digests, more_findings = _read(kind, role.held_out, data, validate)
        digests, findings = digests | more_digests, findings + more_findings
        findings += [f"{kind}: {_said(f)}" for f in reward_data.check(train, held_out)]
        train, _ = without_shared(kind, train, prompts_of(held_out), "also held out", data)
    else:
        findings += [f"{kind}: {_said(f)}" for f in reward_data.check(train)]
        train, held_out = hold_out(train, data.held_out_fraction)
    for part, rows in (("training", train), ("held-out", held_out)):
        if not rows:
            raise UserError(f"data.{kind}: no {part} rows are left", 3)
    return Split(train, held_out, digests, findings)


def _read(
    kind: Any, sources: Sequence[SourceConfig], data: DataConfig, validate: Validate
) -> tuple[list, dict[str, str], list[str]]:
    rows: list = []
    digests: dict[str, str] = {}
    findings: list[str] = []
    for source in sources:
        loaded = _load_source(kind, source, data)
        fit, unfit = _without_unfit(loaded.rows, data, validate)
        rows += fit
        digests[source_name(source)] = loaded.digest
        findings += [f"{kind}: {finding}" for finding in loaded.findings]
        if loaded.refused:
            counts = ", ".join(f"{n} {reason}" for reason, n in sorted(loaded.refused_kinds.items()))
            findings.append(f"{kind}: {len(loaded.refused)} rows of {source.path} skipped ({counts})")
        if unfit:
            findings.append(f"{kind}: {len(unfit)} rows skipped that the chat format cannot hold, first {unfit[0]}")
    return rows, digests, findings


def source_name(source: SourceConfig) -> str:
    return ":".join(filter(None, (source.path, source.config, source.split, source.select_key)))


def digest_now(kind: str, source: SourceConfig, data: DataConfig) -> str | None:
    """The digest that a source on this machine has now; None for one of a hub. UserError (3) if it cannot be read."""
    place = _place(source.path, data.root)
    if place != "shipped" and not Path(place).exists():
        if place == source.path and is_hub_name(place):
            return None
        raise UserError(f"{place} does not exist", 3)
    return _load_source(kind, source, data.model_copy(update={"bad_rows": "skip"})).digest


def _load_source(kind: Any, source: SourceConfig, data: DataConfig) -> reward_data.Loaded:
    select = None
    if source.select_file is not None:
        if source.select_key is None:
            raise UserError(f"data.{kind}: {source.path} has a select_file and no select_key")
        select = (data.root / source.select_file, source.select_key)
    try:
        place = reward_data.Source(
            _place(source.path, data.root),
            format=source.format,
            tag=source.tag,
            split=source.split,
            config=source.config,
            columns=source.columns,
            select=select,
            limit=source.limit,
        )
        return reward_data.load(kind, place, bad_rows=data.bad_rows)
    except DataError as error:
        raise UserError(error.message, 3) from error


def _place(path: str, root: Path) -> str:
    """Where a source is: shipped, under the root, or, if nothing is there, a hub name."""
    if path == "shipped":
        return path
    place = root / path
    return str(place) if place.exists() or not is_hub_name(path) else path


def _without_unfit(rows: list, data: DataConfig, validate: Validate) -> tuple[list, list[str]]:
    """Rows that the chat format can encode, and what is wrong with the others."""
    fit, unfit = [], []
    for row in rows:
        try:
            for messages in _dialogues(row):
                validate(messages)
            fit.append(row)
        except UserError as error:
            unfit.append(f"{row.source}: {error.message}")
    if unfit and data.bad_rows == "refuse":
        raise UserError(f"{unfit[0]} ({len(unfit)} such rows; fix them, or leave them out: data.bad_rows: skip)", 3)
    return fit, unfit


def _dialogues(row: Demonstration | Preference | Prompt) -> list[Sequence[Message]]:
    if isinstance(row, Preference):
        return [(*row.prompt, Message("assistant", response)) for response in (row.chosen, row.rejected)]
    return [row.messages]


def _said(finding: reward_data.Finding) -> str:
    return f"{finding.count} × {finding.kind} ({', '.join(finding.examples)})"
