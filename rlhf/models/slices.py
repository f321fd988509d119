"""Models whose sequences are divided over ranks (`rlhf.distributed.sequence`): attention, and how a slice is read.

B rows, A query heads, K key heads, D head size; rows as a model reads them have W tokens, their slices S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from rlhf.distributed.sequence import SequenceGroup, exchange, sum_of_slices
from rlhf.kernels.attention import attend, reads_row_ends

SLICES = "slices"  # its name in transformers, which makes no masks for it


@dataclass(frozen=True)
class States:
    """What a forward pass says of the tokens of B rows."""

    hidden_MH: Tensor  # before the LM head, of the tokens that this rank has read
    place_BT: Tensor  # int64, where in `hidden_MH` a token's state is; -1 at padding and where another rank has it
    group: SequenceGroup | None  # the ranks that have read these rows

    def everywhere(self, x: Tensor) -> Tensor:
        """x of the tokens of all slices, from tensors that are 0 where another rank has the state."""
        return x if self.group is None else sum_of_slices(x, self.group)

    def values(self, place_BX: Tensor, of: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """float32 [B, X] on every rank, 0 where `place_BX` is -1 on all: `of(hidden_NH, here_BX)` computes N values from the
        states at those places that are here."""
        here_BX = place_BX >= 0
        values = of(self.hidden_MH.index_select(0, place_BX[here_BX]), here_BX)
        return tuple(self.everywhere(x_N.new_zeros(here_BX.shape).masked_scatter(here_BX, x_N)) for x_N in values)


@dataclass(frozen=True)
class Slices:
    """What attention must know of the whole rows when it is given a slice."""

    group: SequenceGroup
    ends: Tensor | None = None  # int32, of the packed rows; None where rows are not packed, or share prompts
    sees_WW: Tensor | None = None  # bool: the tokens that each attends to, where rows share prompts

    @cached_property
    def row_ends(self) -> dict[str, Any]:
        """The ends of packed rows under transformers' names."""
        return {} if self.ends is None else {"cu_seq_lens_q": self.ends, "max_length_q": int(self.ends.diff().max())}

    @cached_property
    def mask_11WW(self) -> Tensor | None:
        """None: every token sees all before it."""
        if self.sees_WW is not None:
            return self.sees_WW[None, None]
        if self.ends is None:
            return None
        place_W = torch.arange(int(self.ends[-1]), device=self.ends.device)
        row_W = torch.bucketize(place_W, self.ends, right=True)
        return ((row_W[:, None] == row_W) & (place_W[:, None] >= place_W))[None, None]


def use_slices(model: Any, group: SequenceGroup) -> None:
    """From now on each rank of the group reads a slice of every sequence with this transformers model."""
    AttentionInterface.register(SLICES, attend_slices)
    model.set_attn_implementation(SLICES)
    model.base_model.sequence_group = group


def group_of_model(model: Any) -> SequenceGroup | None:
    """None where its sequences are not divided."""
    return getattr(model.base_model, "sequence_group", None)


def attend_slices(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: query_BASD, key_BKSD, value_BKSD → (out_BSAD, None). Positions are exchanged
    against heads around the usual attention, which sees whole rows."""
    slices: Slices | None = settings.pop("slices", None)
    if slices is None:
        return attend(module, query, key, value, attention_mask, **settings)
    key, value = (_divisible(x_BKSD, slices.group) for x_BKSD in (key, value))
    heads = SimpleNamespace(
        config=module.config,
        is_causal=getattr(module, "is_causal", True),
        num_key_value_groups=query.shape[1] // key.shape[1],
    )
    query, key, value = (exchange(x, slices.group) for x in (query, key, value))
    settings |= slices.row_ends
    mask = None if reads_row_ends(heads, query, key, value, settings) else slices.mask_11WW
    out_BWXD, _ = attend(heads, query, key, value, mask, **settings)
    return exchange(out_BWXD, slices.group), None


def _divisible(x_BKSD: Tensor, group: SequenceGroup) -> Tensor:
    """Key heads repeated until every rank has equally many. The query heads of a rank still find theirs on it."""
    K = x_BKSD.shape[1]
    return x_BKSD.repeat_interleave(math.lcm(K, group.ranks) // K, dim=1)


def read_slice(
    read: Callable[..., Any],
    tokens_BW: Tensor,
    position_BW: Tensor,
    group: SequenceGroup,
    ends: Tensor | None = None,
    sees_WW: Tensor | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(hidden_MH of this rank's slice, a function from places in the whole [B, W] to those in the slice).

    Columns that make W divisible are a packed row of their own, and else see rows that do not see them.
    """
    W = tokens_BW.shape[1]
    more = -W % group.ranks
    if more and ends is not None:
        ends = torch.cat([ends, ends[-1:] + more])
    if more and sees_WW is not None:
        sees_WW = F.pad(sees_WW, (0, more, 0, more))
        sees_WW[range(W, W + more), range(W, W + more)] = True  # a softmax over nothing would be NaN
    S = (W + more) // group.ranks
    first = group.rank * S
    tokens_BS, position_BS = (F.pad(x_BW, (0, more))[:, first : first + S] for x_BW in (tokens_BW, position_BW))
    out = read(input_ids=tokens_BS, position_ids=position_BS, slices=Slices(group, ends, sees_WW))

    def in_slice(place: Tensor) -> Tensor:
        row, column = place // W, place % W
        here = (place >= 0) & (column // S == group.rank)
        return torch.where(here, row * S + column - first, -1)

    return out.last_hidden_state.flatten(0, 1), in_slice
