"""Held-out rows, drawing rows by hash, and the mixture of a reward model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from reward_data import Demonstration, Preference, Prompt, normalised_prompt, prompt_of
from rlhf.config import DataConfig, RewardModelConfig
from rlhf.errors import UserError

Row = TypeVar("Row", Demonstration, Preference, Prompt)


@dataclass(frozen=True)
class Split:
    train: list
    held_out: list
    digests: dict[str, str]  # path of a source → SHA-256 of what was read
    findings: list[str]  # what was left out or looks wrong, for people


def without_shared(kind: str, train: list, held_out: set[str], where: str, data: DataConfig) -> tuple[list, list]:
    """Training rows whose prompt is not in `held_out`, and the others; UserError (3) if these are refused.

    `where` says in the message where their prompt is held out.
    """
    kept, shared = [], []
    for row in train:
        (shared if normalised_prompt(prompt_of(row)) in held_out else kept).append(row)
    if shared and data.shared_prompts == "refuse":
        raise UserError(
            f"data.{kind}: {len(shared)} training rows have a prompt that is {where}, the first is "
            f"{shared[0].source}; fix the files, or leave these rows out (data.shared_prompts: drop)",
            3,
        )
    return kept, shared


def prompts_of(rows: Sequence[Any]) -> set[str]:
    return {normalised_prompt(prompt_of(row)) for row in rows}


def hold_out(rows: list, fraction: float) -> tuple[list, list]:
    """Training and held-out rows by a hash of the first user text, so that a dialogue is never on both sides."""
    parts: tuple[list, list] = ([], [])
    for row in rows:
        first = next(m for m in prompt_of(row) if m.role == "user")
        digest = hashlib.sha256(normalised_prompt([first]).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(row)
    return parts


def hold_out_everywhere(splits: Mapping[str, Split], data: DataConfig) -> dict[str, Split]:
    """`splits` by role without training rows whose prompt is held out in another role.

    UserError (3) if there are some and `data.shared_prompts` refuses them, or if no training row is left.
    """
    held_out = {role: prompts_of(split.held_out) for role, split in splits.items()}
    return {role: _without_others(role, split, held_out, data) for role, split in splits.items()}


def _without_others(role: str, split: Split, held_out: Mapping[str, set[str]], data: DataConfig) -> Split:
    train, digests, findings = split.train, dict(split.digests), [*split.findings]
    for other in (
        name for name in held_out if name != role
    ):  # in the same order everywhere, because digests depend on it
        train, shared = without_shared(role, train, held_out[other], f"held out in data.{other}", data)
        if shared:
            names = sorted(row.source for row in shared)
            digests[f"held out in {other}"] = hashlib.sha256("\n".join(names).encode()).hexdigest()
            findings.append(f"{role}: {len(shared)} training rows left out whose prompt is held out in {other}")
    if not train:
        raise UserError(f"data.{role}: no training rows are left; all their prompts are held out in other roles", 3)
    return replace(split, train=train, digests=digests, findings=findings)


def draw_rows(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(`count` rows, the other rows), drawn by a hash of their prompts, independently of their order in the files.

    Stratified: every tag and source has the same proportion as in the whole, within one prompt. Rows with one prompt
    stay together, so fewer than `count` are drawn if the next prompt has more rows than are wanted. Both lists are in
    the order of the draw, so their beginnings are mixed too.
    """
    rows_of: dict[str, list[Row]] = {}
    for row in rows:
        rows_of.setdefault(normalised_prompt(prompt_of(row)), []).append(row)

    def key(prompt: str) -> str:
        return hashlib.sha256(f"{seed}/{prompt}".encode()).hexdigest()

    strata: dict[tuple[str, str], list[str]] = {}
    for prompt in sorted(rows_of, key=key):
        strata.setdefault(min((row.tag, row.source.rpartition(":")[0]) for row in rows_of[prompt]), []).append(prompt)
    # The k-th of n prompts is placed at (k + ½) / n, so every beginning of the list has the proportions of the whole.
    places = [((k + 0.5) / len(own), key(prompt), prompt) for own in strata.values() for k, prompt in enumerate(own)]
    drawn: list[Row] = []
    others: list[Row] = []
    for _, _, prompt in sorted(places):
        wanted = not others and len(drawn) + len(rows_of[prompt]) <= count
        (drawn if wanted else others).extend(rows_of[prompt])
    return drawn, others


def split_held_out(prompts: Sequence[Prompt], for_choice: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that select the best iteration, and others for the report, because a maximum overestimates itself.

    UserError (3) if nothing is left for the report.
    """
    if len(prompts) <= for_choice:
        raise UserError(
            f"ppo.eval_prompts is {for_choice}, but only {len(prompts)} prompts are held out; "
            "the report needs some that did not choose the policy. Lower ppo.eval_prompts or hold out more.",
            3,
        )
    return draw_rows(prompts, for_choice, seed)


def mix_preferences(rows: Sequence[Preference], model: RewardModelConfig, seed: int) -> list[Preference]:
    """All rows of the model's own tag, and others drawn at random until they are `other_fraction` of the set
    (§3.2.2)."""
    own = [row for row in rows if row.tag == model.own_tag]
    other = [row for row in rows if row.tag != model.own_tag]
    if not own:
        raise UserError(
            f"no preference is tagged {model.own_tag!r}; tag a source (data.preferences.train: tag: {model.own_tag}) "
            "or leave that reward model out",
            3,
        )
    if model.other_fraction < 1:
        wanted = round(len(own) * model.other_fraction / (1 - model.other_fraction))
        other = random.Random(seed).sample(other, min(wanted, len(other)))
    mixed = [*(own if model.other_fraction < 1 else []), *other]
    random.Random(seed + 1).shuffle(mixed)
    return mixed
