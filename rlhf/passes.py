"""Forward passes: which rows a rank reads together, so that none is too large and every rank makes equally many."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf import ranks
from rlhf.batches import Experience, Rollout
from rlhf.config import PPOConfig


def passes_of_shares(rollout: Rollout, config: PPOConfig) -> list[Tensor]:
    """Row numbers of each pass over this rank's rows. Every rank must call it, with equally many rows."""
    lengths_N2 = _lengths(rollout)
    order_N = _longest_first(lengths_N2)
    of_ranks = ranks.gather_objects(lengths_N2[order_N].tolist())
    return list(order_N.split(_pass_sizes(torch.tensor(of_ranks).transpose(0, 1), config)))


def passes_of_minibatch(
    experience: Experience, index: Tensor, rank: int, world: int, config: PPOConfig
) -> list[Tensor]:
    """Row numbers of each of this rank's passes over the rows `index`, which all ranks share. Rows are dealt out by
    length, so that the passes of one moment are equally long everywhere."""
    lengths_M2 = _lengths(experience)[index]
    order_NW = _longest_first(lengths_M2).view(-1, world)
    return list(index[order_NW[:, rank]].split(_pass_sizes(lengths_M2[order_NW], config)))


def tokens_of_shares(rollout: Rollout, world: int, config: PPOConfig) -> int:
    """Tokens that a model computes, padding inside, where each rank reads its share of the whole `rollout`."""
    shares_WN2 = _lengths(rollout).view(world, -1, 2)
    return _computed(torch.stack([share_N2[_longest_first(share_N2)] for share_N2 in shares_WN2], 1), config)


def tokens_of_minibatch(batch: Rollout | Experience, index: Tensor, world: int, config: PPOConfig) -> int:
    """The same for the passes of all ranks over the rows `index`."""
    lengths_M2 = _lengths(batch)[index]
    return _computed(lengths_M2[_longest_first(lengths_M2).view(-1, world)], config)


def _computed(lengths_NW2: Tensor, config: PPOConfig) -> int:
    passes = lengths_NW2.split(_pass_sizes(lengths_NW2, config))
    return sum(int(_tokens_W(pass_NW2, config.packing).sum()) for pass_NW2 in passes)


def _pass_sizes(lengths_NW2: Tensor, config: PPOConfig) -> list[int]:
    """How many of N rows go into each pass, the same on all W ranks: under ZeRO-3 they wait for one another.

    The limit is `micro_batch_size` rows or, where it is set, `micro_batch_tokens` on the rank that has most; a row that
    is longer than that goes alone.
    """
    N, limit = len(lengths_NW2), config.micro_batch_tokens
    if limit is None:
        return [len(rows) for rows in torch.arange(N).split(config.micro_batch_size)]
    starts = [0]
    for end in range(1, N + 1):
        if end - starts[-1] > 1 and _tokens_W(lengths_NW2[starts[-1] : end], config.packing).max() > limit:
            starts.append(end - 1)
    return [end - start for start, end in zip(starts, [*starts[1:], N], strict=True)]


def _tokens_W(lengths_NW2: Tensor, packing: bool) -> Tensor:
    """Tokens of a pass of N rows on each rank, padding inside where there is any."""
    if packing:
        return lengths_NW2.sum((0, 2))
    return len(lengths_NW2) * lengths_NW2.amax(0).sum(-1)  # all seams in one column: the widths of sides add up


def _lengths(batch: Rollout | Experience) -> Tensor:
    """lengths_B2: tokens of prompt and of response."""
    response_B = batch.response_mask_BR.sum(1)
    return torch.stack([batch.mask_BT.sum(1) - response_B, response_B], 1)


def _longest_first(lengths_B2: Tensor) -> Tensor:
    return lengths_B2.sum(1).argsort(descending=True, stable=True)
