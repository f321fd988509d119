"""The run's data as records in `runs/<run>/data`: parsed once, by the driver or the first rank, and read by every rank.

`data.json` is written last. It holds the settings of the data and the digests of the user's files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reward_data import Demonstration, Message, Preference, Prompt, normalised_prompt, prompt_of
from rlhf.config import RunConfig
from rlhf.data.loading import load_demonstrations
from rlhf.data.splitting import Split

MANIFEST = "data.json"
RECORDS = {"demonstrations": Demonstration, "preferences": Preference, "prompts": Prompt}


def write(config: RunConfig, splits: Mapping[str, Split]) -> None:
    """Writes `splits` by role and replaces older data."""
    folder = _folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for role, split in splits.items():
        for part in ("train", "held_out"):
            _write_rows(folder / f"{role}.{part}.jsonl", getattr(split, part))
    roles = {role: {"digests": split.digests, "findings": split.findings} for role, split in splits.items()}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps({"settings": _settings(config), "roles": roles}, indent=1), encoding="utf-8")
    partial.rename(folder / MANIFEST)


def manifest(config: RunConfig) -> dict[str, Any] | None:
    """`digests` and `findings` by role; None if the data was not parsed yet, or with other settings."""
    try:
        found = json.loads((_folder(config) / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found["roles"] if found["settings"] == _settings(config) else None


def read(config: RunConfig, roles: Sequence[str]) -> dict[str, Split]:
    """The data of `roles`, which must have been written."""
    found = manifest(config)
    assert found is not None, f"{_folder(config)} holds no data of this run"
    return {
        role: Split(
            read_rows(_folder(config) / f"{role}.train.jsonl", role),
            read_rows(held_out_file(config, role), role),
            **found[role],
        )
        for role in roles
    }


def held_out_file(config: RunConfig, role: str) -> Path:
    return _folder(config) / f"{role}.held_out.jsonl"


def training_demonstrations(config: RunConfig) -> list[Demonstration]:
    """For the tokenizer of a tiny model, which may be needed before the data was written."""
    if manifest(config) is None:
        return load_demonstrations(config).train
    return read_rows(_folder(config) / "demonstrations.train.jsonl", "demonstrations")


def _folder(config: RunConfig) -> Path:
    return config.folder / "data"


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings on which the rows depend; the chat format decides which dialogues can be used."""
    model = {"path": config.model.path, "chat_format": config.model.chat_format}
    return {"data": config.data.model_dump(mode="json"), "model": model}


def _write_rows(path: Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False, default=str) + "\n" for row in rows)


def read_rows(path: Path, role: str) -> list[Any]:
    """The records of one of the files that `write` made."""
    return list(_each_row(path, role))


def trained_prompts(config: RunConfig, roles: Iterable[str], wanted: Collection[str]) -> set[str]:
    """Those of the normalised prompts `wanted` that a training row of one of the roles has."""
    return {
        prompt
        for role in roles
        for row in _each_row(_folder(config) / f"{role}.train.jsonl", role)
        if (prompt := normalised_prompt(prompt_of(row))) in wanted
    }


def _each_row(path: Path, role: str) -> Iterator[Any]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield _record(role, json.loads(line))


def _record(role: str, row: dict[str, Any]) -> Any:
    dialogue = {key: tuple(Message(**m) for m in row[key]) for key in ("messages", "prompt") if key in row}
    return RECORDS[role](**row | dialogue)
