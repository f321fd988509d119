"""From records to tokens: reads what the run names, holds prompts out, mixes and encodes.

Rows that are too long are left out and counted, never cut: a cut answer teaches to stop in the middle.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import reward_data
from reward_data import DataError, Demonstration, Message, Preference, Prompt, normalised_prompt, prompt_of
from reward_data.files import is_hub_name
from rlhf.chat import ChatMessage, format_of, llama2
from rlhf.config import DataConfig, RewardModelConfig, RoleConfig, RunConfig, SourceConfig
from rlhf.data import batches
from rlhf.data.batches import PromptBatch
from rlhf.errors import UserError

log = logging.getLogger(__name__)

Row = TypeVar("Row", Demonstration, Preference, Prompt)
Validate = Callable[[Sequence[ChatMessage]], None]

MARGINS: dict[str, dict[str, float]] = {  # Llama 2, table 27
    "none": {"significantly": 0.0, "better": 0.0, "slightly": 0.0, "negligibly": 0.0, "unrated": 0.0},
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0, "unrated": 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligibly": 0.0, "unrated": 0.0},
}
SAFETY = {"safe": 1, "unsafe": 0, "unknown": -1}


@dataclass(frozen=True)
class Split:
    train: list
    held_out: list
    digests: dict[str, str]  # path of a source → SHA-256 of what was read
    findings: list[str]  # what was left out or looks wrong, for people


def load_demonstrations(config: RunConfig, validate: Validate = llama2.validate) -> Split:
    """Demonstrations of the run. UserError (3) names file, line and reason of what cannot be used.

    `validate` raises UserError for messages that the chat format cannot hold.
    """
    return _load("demonstrations", config.data.demonstrations, config.data, validate)


def load_preferences(config: RunConfig, validate: Validate = llama2.validate) -> Split:
    """Preferences of the run, without safety pairs that prefer an unsafe answer to a safe one (Llama 2, §3.2.1)."""
    split = _load("preferences", config.data.preferences, config.data, validate)
    train, held_out = ([row for row in rows if not _prefers_unsafe(row)] for rows in (split.train, split.held_out))
    dropped = len(split.train) + len(split.held_out) - len(train) - len(held_out)
    findings = [f"preferences: {dropped} pairs left out that prefer an unsafe answer to a safe one"] if dropped else []
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
        train, _ = _without_shared(kind, train, _prompts_of(held_out), "also held out", data)
    else:
        findings += [f"{kind}: {_said(f)}" for f in reward_data.check(train)]
        train, held_out = _hold_out(train, data.held_out_fraction)
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
        name = ":".join(filter(None, (source.path, source.config, source.split, source.select_key)))
        digests[name] = loaded.digest
        findings += [f"{kind}: {finding}" for finding in loaded.findings]
        if loaded.refused:
            counts = ", ".join(f"{n} {reason}" for reason, n in sorted(loaded.refused_kinds.items()))
            findings.append(f"{kind}: {len(loaded.refused)} rows of {source.path} skipped ({counts})")
        if unfit:
            findings.append(f"{kind}: {len(unfit)} rows skipped that the chat format cannot hold, first {unfit[0]}")
    return rows, digests, findings


def _load_source(kind: Any, source: SourceConfig, data: DataConfig) -> reward_data.Loaded:
    select = None
    if source.select_file is not None:
        if source.select_key is None:
            raise UserError(f"data.{kind}: {source.path} has a select_file and no select_key")
        select = (data.root / source.select_file, source.select_key)
    try:
        return reward_data.load(
            kind,
            _place(source.path, data.root),
            format=source.format,
            tag=source.tag,
            split=source.split,
            config=source.config,
            columns=source.columns,
            select=select,
            limit=source.limit,
            bad_rows=data.bad_rows,
        )
    except DataError as error:
        raise UserError(error.message, 3) from error


def _place(path: str, root: Path) -> str:
    """Where a source is: shipped, under the root, or (where nothing lies there) a hub name."""
    if path == "shipped":
        return path
    place = root / path
    return str(place) if place.exists() or not is_hub_name(path) else path


def _without_unfit(rows: list, data: DataConfig, validate: Validate) -> tuple[list, list[str]]:
    """Rows that the chat format can hold, and what is wrong with the others."""
    fit, unfit = [], []
    for row in rows:
        try:
            for messages in _dialogues(row):
                validate(messages)
            fit.append(row)
        except UserError as error:
            unfit.append(f"{row.source}: {error.message}")
    if unfit and data.bad_rows == "refuse":
        raise UserError(f"{unfit[0]} ({len(unfit)} such rows; mend them, or leave them out: data.bad_rows: skip)", 3)
    return fit, unfit


def _dialogues(row: Demonstration | Preference | Prompt) -> list[Sequence[Message]]:
    if isinstance(row, Preference):
        return [(*row.prompt, Message("assistant", answer)) for answer in (row.chosen, row.rejected)]
    return [row.messages]


def _said(finding: reward_data.Finding) -> str:
    return f"{finding.count} × {finding.kind} ({', '.join(finding.examples)})"


def _without_shared(kind: str, train: list, held_out: set[str], where: str, data: DataConfig) -> tuple[list, list]:
    """Training rows whose prompt is none of `held_out`, and the others; UserError (3) where these are refused.

    `where` says in the message where their prompt is held out.
    """
    kept, shared = [], []
    for row in train:
        (shared if normalised_prompt(prompt_of(row)) in held_out else kept).append(row)
    if shared and data.shared_prompts == "refuse":
        raise UserError(
            f"data.{kind}: {len(shared)} training rows have a prompt that is {where}, the first is "
            f"{shared[0].source}; mend the files, or leave these rows out (data.shared_prompts: drop)",
            3,
        )
    return kept, shared


def _prompts_of(rows: Sequence[Any]) -> set[str]:
    return {normalised_prompt(prompt_of(row)) for row in rows}


def _hold_out(rows: list, share: float) -> tuple[list, list]:
    """Training and held-out rows by a hash of the first user text, so that one dialogue never stands on both sides."""
    parts: tuple[list, list] = ([], [])
    for row in rows:
        first = next(m for m in prompt_of(row) if m.role == "user")
        digest = hashlib.sha256(normalised_prompt([first]).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < share * 2**64].append(row)
    return parts


def hold_out_everywhere(splits: Mapping[str, Split], data: DataConfig) -> dict[str, Split]:
    """What is held out for one role is trained on in none: `splits` by role, without such training rows.

    UserError (3) where there are some and `data.shared_prompts` refuses them, or where no training row is left.
    """
    held_out = {role: _prompts_of(split.held_out) for role, split in splits.items()}
    return {role: _without_others(role, split, held_out, data) for role, split in splits.items()}


def _without_others(role: str, split: Split, held_out: Mapping[str, set[str]], data: DataConfig) -> Split:
    train, digests, findings = split.train, dict(split.digests), [*split.findings]
    for other in (name for name in held_out if name != role):  # in one order everywhere: the digests name it
        train, shared = _without_shared(role, train, held_out[other], f"held out in data.{other}", data)
        if shared:
            names = sorted(row.source for row in shared)
            digests[f"held out in {other}"] = hashlib.sha256("\n".join(names).encode()).hexdigest()
            findings.append(f"{role}: {len(shared)} training rows left out whose prompt is held out in {other}")
    if not train:
        raise UserError(f"data.{role}: no training rows are left; all their prompts are held out in other roles", 3)
    return replace(split, train=train, digests=digests, findings=findings)


def draw_rows(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(`count` rows, the others), drawn by a hash of their prompts, whatever their order in the files.

    Stratified: of every tag and source as large a part as of the whole, within one prompt. Rows that share a prompt stay
    together, so fewer than `count` are drawn where the next prompt has more rows than are wanted. Both lists are in the
    order of the draw, so their beginnings are mixed too.
    """
    rows_of: dict[str, list[Row]] = {}
    for row in rows:
        rows_of.setdefault(normalised_prompt(prompt_of(row)), []).append(row)

    def key(prompt: str) -> str:
        return hashlib.sha256(f"{seed}/{prompt}".encode()).hexdigest()

    strata: dict[tuple[str, str], list[str]] = {}
    for prompt in sorted(rows_of, key=key):
        strata.setdefault(min((row.tag, row.source.rpartition(":")[0]) for row in rows_of[prompt]), []).append(prompt)
    # The k-th of n prompts stands at (k + ½) / n, so every beginning of the list has the proportions of the whole.
    places = [((k + 0.5) / len(own), key(prompt), prompt) for own in strata.values() for k, prompt in enumerate(own)]
    drawn: list[Row] = []
    others: list[Row] = []
    for _, _, prompt in sorted(places):
        wanted = not others and len(drawn) + len(rows_of[prompt]) <= count
        (drawn if wanted else others).extend(rows_of[prompt])
    return drawn, others


def split_held_out(prompts: Sequence[Prompt], for_choice: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that choose the best iteration, and others for the report: a maximum must not be its own witness.

    UserError (3) where nothing is left for the report.
    """
    if len(prompts) <= for_choice:
        raise UserError(
            f"ppo.eval_prompts is {for_choice}, but only {len(prompts)} prompts are held out; "
            "the report needs some that did not choose the policy. Lower ppo.eval_prompts or hold out more.",
            3,
        )
    return draw_rows(prompts, for_choice, seed)


def mix_preferences(rows: Sequence[Preference], model: RewardModelConfig, seed: int) -> list[Preference]:
    """All rows of the model's own tag, and others drawn evenly until they are `other_fraction` of the set (§3.2.2)."""
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


def encode_demonstrations(tokenizer: Any, rows: Sequence[Demonstration], max_length: int) -> list[dict[str, list[int]]]:
    """`input_ids` and `assistant_masks` of each row, as TRL's SFTTrainer names them; rows over `max_length` left out."""

    chat = format_of(tokenizer)

    def encode(row: Demonstration) -> dict[str, list[int]]:
        ids, mask = chat.encode(row.messages)
        return {"input_ids": ids, "assistant_masks": mask}

    return _encode_all("demonstrations", rows, encode, lambda row: len(row["input_ids"]), max_length)


def encode_preferences(
    tokenizer: Any, rows: Sequence[Preference], margin: str, max_length: int
) -> list[dict[str, Any]]:
    """`chosen_ids`, `rejected_ids` and `margin` of each pair, as TRL's RewardTrainer names them; pairs with a side over
    `max_length` left out. `chosen_is_safe` and `rejected_is_safe` are 1, 0, or -1 where nobody said.
    """

    chat = format_of(tokenizer)

    def encode(row: Preference) -> dict[str, Any]:
        return {
            "chosen_ids": chat.encode_response(row.prompt, row.chosen),
            "rejected_ids": chat.encode_response(row.prompt, row.rejected),
            "margin": MARGINS[margin][row.rating],
            "chosen_is_safe": SAFETY[row.chosen_safety],
            "rejected_is_safe": SAFETY[row.rejected_safety],
        }

    def length(pair: dict[str, Any]) -> int:
        return max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))

    return _encode_all("preferences", rows, encode, length, max_length)


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt(Prompt):
    tokens: list[int] = field(hash=False)


def short_prompts(tokenizer: Any, prompts: Sequence[Prompt], max_prompt_length: int) -> list[EncodedPrompt]:
    """The prompts that fit into `max_prompt_length` tokens, with their tokens: no later batch encodes them again."""
    chat = format_of(tokenizer)

    def encode(row: Prompt) -> EncodedPrompt:
        return EncodedPrompt(**vars(row), tokens=chat.encode_prompt(row.messages))

    return _encode_all("prompts", prompts, encode, lambda row: len(row.tokens), max_prompt_length)


def _encode_all(
    kind: str, rows: Sequence[Any], encode: Callable[[Any], Any], length: Callable[[Any], int], max_length: int
) -> list:
    encoded = [_with_source(row, encode) for row in rows]
    short = [row for row in encoded if length(row) <= max_length]
    if len(short) < len(encoded):
        log.warning("%d of %d %s left out: over %d tokens", len(encoded) - len(short), len(encoded), kind, max_length)
    if not short and encoded:
        raise UserError(f"all {len(encoded)} {kind} are over {max_length} tokens; raise the length of this stage", 3)
    return short


def _with_source(row: Any, encode: Callable[[Any], Any]) -> Any:
    try:
        return encode(row)
    except UserError as error:
        raise UserError(f"{row.source}: {error.message}", error.exit_code) from error


def prompt_batch(tokenizer: Any, prompts: Sequence[Prompt], ids: Sequence[int], max_prompt_length: int) -> PromptBatch:
    """Open prompts, left-padded. `ids`: keys of their answers. UserError (3) for one that is too long."""
    chat = format_of(tokenizer)

    def tokens_of(row: Prompt) -> list[int]:
        return row.tokens if isinstance(row, EncodedPrompt) else chat.encode_prompt(row.messages)

    encoded = [_with_source(row, tokens_of) for row in prompts]
    for row, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) > max_prompt_length:
            raise UserError(f"{row.source}: the prompt has {len(tokens)} tokens, over {max_prompt_length}", 3)
    tokens_BP, mask_BP = pad(encoded, tokenizer.pad_token_id, left=True)
    is_safety_B = torch.tensor([row.tag == "safety" for row in prompts])
    return PromptBatch(tokens_BP, mask_BP, is_safety_B, torch.tensor(ids, dtype=torch.long))


def next_prompts(tokenizer: Any, prompts: Sequence[Any], config: RunConfig, iteration: int) -> PromptBatch:
    """The iteration's prompts, the same on all ranks: a new permutation for every pass through the set, each prompt as
    often as it gets answers.

    An id counts passes and answers too: a prompt that is drawn twice in an iteration gets other answers.
    """
    answers = config.ppo.group_size
    size, count, ids = config.ppo.batch_size // answers, len(prompts), []
    for draw in range((iteration - 1) * size, iteration * size):
        epoch, place = divmod(draw, count)
        if not ids or place == 0:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        ids.append(epoch * count + order[place])
    once = prompt_batch(tokenizer, [prompts[i % count] for i in ids], ids, config.ppo.max_prompt_length)
    answer_B = torch.arange(size * answers)
    repeated = batches.select(once, answer_B // answers)
    return replace(repeated, ids_B=repeated.ids_B * answers + answer_B % answers)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """tokens_BT int64 and mask_BT bool of sequences of unequal length; the mask comes from the lengths."""
    longest = max(len(sequence) for sequence in sequences)
    tokens_BT = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        tokens_BT[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask_BT[row, place] = True
    return tokens_BT, mask_BT
