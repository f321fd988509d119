"""The dataclasses of tensors. B batch, P prompt length (left-padded), R response length (right-padded), T = P + R.

Masks are True (or 1) at real tokens. Every field is always set; its name ends with its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class PromptBatch:
    tokens_BP: Tensor  # int64, left-padded
    mask_BP: Tensor  # bool
    is_safety_B: Tensor  # bool
    ids_B: Tensor  # int64, the key of all random numbers of the row


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled responses."""

    tokens_BT: Tensor  # int64: left-padded prompt, then right-padded response
    mask_BT: Tensor  # bool
    response_mask_BR: Tensor  # bool, EOS included
    behaviour_logprobs_BR: Tensor  # float32, by the sampler, at the sampling temperature
    finished_B: Tensor  # bool: the response ends with a stop id


@dataclass(frozen=True)
class Scores:
    """Logprobs, values and rewards of a rollout, without gradient."""

    logprobs_BR: Tensor  # float32, policy, by the training engine
    ref_logprobs_BR: Tensor  # float32
    values_BR: Tensor  # float32, of the critic at positions P-1 … T-2; 0 without a critic
    rewards_BN: Tensor  # float32, one column per reward; 0 where it failed
    failed_BN: Tensor  # bool


@dataclass(frozen=True)
class Experience:
    """Everything that an update needs."""

    tokens_BT: Tensor  # int64
    mask_BT: Tensor  # bool
    response_mask_BR: Tensor  # bool
    counted_B: Tensor  # bool, False for rows whose score failed
    old_logprobs_BR: Tensor  # float32
    ref_logprobs_BR: Tensor  # float32
    old_values_BR: Tensor  # float32
    advantages_BR: Tensor  # float32
    returns_BR: Tensor  # float32
    importance_BR: Tensor  # float32, detached min(π_train/π_sampler, C)
    weight_BR: Tensor  # float32, of each token in the policy loss; 0 in rows without a score
    denominator_B: Tensor  # float32, each row's part of the divisor of the policy loss


def select(batch: Batch, index) -> Batch:
    """The rows `index` (slice, list or tensor) of a batch."""
    return type(batch)(**{f.name: getattr(batch, f.name)[index] for f in fields(batch)})  # type: ignore[arg-type]


def first_with_prompt(tokens_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """first_B: the index of the first row with the same prompt."""
    row_B = torch.arange(len(tokens_BP), device=tokens_BP.device)
    _, prompt_B = tokens_BP.masked_fill(~mask_BP, -1).unique(dim=0, return_inverse=True)
    return row_B.clone().scatter_reduce(0, prompt_B, row_B, "amin", include_self=False)[prompt_B]


def cat(parts: Sequence[Batch]) -> Batch:
    """The rows of all parts, in order. Other dimensions must agree."""
    names = [f.name for f in fields(parts[0])]  # type: ignore[arg-type]
    return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return type(batch)(**{f.name: getattr(batch, f.name).to(device) for f in fields(batch)})  # type: ignore[arg-type]


def trim(batch: Batch) -> Batch:
    """A Rollout or Experience without the columns that no row uses; rows and their order stay."""
    mask_BT, response_mask_BR = batch.mask_BT, batch.response_mask_BR  # type: ignore[attr-defined]
    R = response_mask_BR.shape[1]
    P = mask_BT.shape[1] - R
    left = P - int(mask_BT[:, :P].sum(1).max())
    keep = max(int(response_mask_BR.sum(1).max()), 1)
    columns = {"BT": slice(left, P + keep), "BR": slice(0, keep)}
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}  # type: ignore[arg-type]
    shapes = {name: name.rsplit("_", 1)[-1] for name in values}
    return type(batch)(**{n: v[:, columns[shapes[n]]] if shapes[n] in columns else v for n, v in values.items()})
