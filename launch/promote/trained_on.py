"""Leaves out of a comparison what one of the models has trained on, where it would look better than it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.promote.plan import settings_of
from reward_data import normalised_prompt, prompt_of
from rlhf.config import RunConfig
from rlhf.data import parsed, split_held_out
from rlhf.data.loading import source_name
from rlhf.errors import UserError
from rlhf.runs import artifacts
from rlhf.tracking import Version

FEWEST = 30  # prompts that must remain where some were left out


def leave_out(rows: Sequence[Any], versions: Sequence[Version], digests: Mapping[str, str]) -> tuple[list, list[str]]:
    """The rows whose prompt none of the models has trained on, and what was left out, or could not be told.

    `digests`: of the files that the rows come from, by name. UserError (3) if too few prompts remain, or if a file is one
    that a model has trained on.
    """
    keys = [normalised_prompt(prompt_of(row)) for row in rows]
    notes, seen = [], set()
    for version in versions:
        own = trained_on(version.path, version.tags["artifact.kind"], set(keys))
        if own is None:
            _refuse_files(version, digests)
            notes.append(f"the data of {version.uri} is gone or was replaced, so its training prompts are not known")
        elif own:
            count = sum(key in own for key in keys)
            notes.append(
                f"{count} of {len(rows)} rows left out: {version.uri} trained on their prompts or was chosen by them"
            )
        seen |= own or set()
    kept = [row for row, key in zip(rows, keys, strict=True) if key not in seen]
    remaining = len(set(keys) - seen)
    if seen and remaining < FEWEST:
        text = f"only {remaining} of {len(set(keys))} prompts remain, and {FEWEST} are needed; give other data"
        raise UserError("; ".join([*notes, text]), 3)
    return kept, notes


def trained_on(folder: Path, kind: str, prompts: Collection[str]) -> set[str] | None:
    """Those of the normalised `prompts` that the artifact in `folder` trained on, or by which PPO chose it; None where the
    data beside it is not that of its manifest.
    """
    config, parents = _settings(folder, kind), artifacts.load(folder).parents
    found = config and parsed.manifest(config)
    if not config or not found:
        return None
    for name, digest in parents.items():
        role, is_data, source = name.partition(": ")
        if is_data and found.get(role, {"digests": {}})["digests"].get(source) != digest:
            return None
    chosen_by = []
    if kind == "ppo":
        held_out = parsed.read_rows(parsed.held_out_file(config, "prompts"), "prompts")
        chosen_by = split_held_out(held_out, config.ppo.eval_prompts, config.seed)[0]
    of_choice = {normalised_prompt(row.messages) for row in chosen_by}.intersection(prompts)
    return of_choice | parsed.trained_prompts(config, found, prompts)


def _settings(folder: Path, kind: str) -> RunConfig | None:
    try:
        return settings_of(folder, kind)
    except UserError:
        return None


def _refuse_files(version: Version, digests: Mapping[str, str]) -> None:
    config, parents = _settings(version.path, version.tags["artifact.kind"]), artifacts.load(version.path).parents
    held_out: set[str] = set()
    for role, sources in config.data if config else ():
        if role in parsed.RECORDS and sources:
            held_out |= {f"{role}: {source_name(one)}" for one in sources.held_out}
    trained = {digest for name, digest in parents.items() if ": " in name and name not in held_out}
    for name, digest in digests.items():
        if digest in trained:
            raise UserError(f"{name}: {version.uri} has trained on this file; give other data", 3)
