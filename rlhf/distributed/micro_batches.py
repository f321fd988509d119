"""Micro-batches: groups of rows of limited size, equally many on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.data.batches import Experience, Rollout, first_with_prompt
from rlhf.distributed import collectives


def micro_batches_of_shards(rollout: Rollout, config: PPOConfig) -> list[Tensor]:
    """Row numbers of each micro-batch of this rank's rows. Every rank must call it with equally many rows."""
    lengths_N3 = _lengths(rollout, config)
    order_N = _order(lengths_N3, config)
    of_ranks = collectives.gather_objects(lengths_N3[order_N].tolist())
    return list(order_N.split(_pass_sizes(torch.tensor(of_ranks).transpose(0, 1), config)))


def micro_batches_of_minibatch(
    experience: Experience, index: Tensor, rank: int, world: int, config: PPOConfig
) -> list[Tensor]:
    """Row numbers of each of this rank's micro-batches of the rows `index`, which are divided among all ranks by
    length, so that simultaneous micro-batches have similar lengths."""
    lengths_M3 = _lengths(experience, config)[index]
    order_NW = _dealt(_order(lengths_M3, config), world, config)
    return list(index[order_NW[:, rank]].split(_pass_sizes(lengths_M3[order_NW], config)))


def in_row_order(parts: list[Tensor], micro_batches: list[Tensor]) -> Tensor:
    """Results of micro-batches, put back into the order of the rows."""
    return torch.cat(parts)[torch.cat(micro_batches).argsort().to(parts[0].device)]


def tokens_of_shards(rollout: Rollout, world: int, config: PPOConfig) -> int:
    """Tokens that a model computes, padding included, if each rank reads its shard of the whole `rollout`."""
    shares_WN3 = _lengths(rollout, config).view(world, -1, 3)
    return _computed(torch.stack([share_N3[_order(share_N3, config)] for share_N3 in shares_WN3], 1), config)


def tokens_of_minibatch(batch: Rollout | Experience, index: Tensor, world: int, config: PPOConfig) -> int:
    """The same for the micro-batches of all ranks over the rows `index`."""
    lengths_M3 = _lengths(batch, config)[index]
    return _computed(lengths_M3[_dealt(_order(lengths_M3, config), world, config)], config)


def _computed(lengths_NW3: Tensor, config: PPOConfig) -> int:
    passes = lengths_NW3.split(_pass_sizes(lengths_NW3, config))
    return sum(int(_tokens_W(pass_NW3, config.packing).sum()) for pass_NW3 in passes)


def _pass_sizes(lengths_NW3: Tensor, config: PPOConfig) -> list[int]:
    """How many of N rows go into each micro-batch, the same on all W ranks, because every forward pass is a collective
    under ZeRO-3.

    The limit is `micro_batch_size` rows or, if set, `micro_batch_tokens` on the rank with most tokens. A longer row is
    a micro-batch of its own.
    """
    N, limit = len(lengths_NW3), config.micro_batch_tokens
    if limit is None:
        return [len(rows) for rows in torch.arange(N).split(config.micro_batch_size)]
    starts = [0]
    for end in range(1, N + 1):
        if end - starts[-1] > 1 and _tokens_W(lengths_NW3[starts[-1] : end], config.packing).max() > limit:
            starts.append(end - 1)
    return [end - start for start, end in zip(starts, [*starts[1:], N], strict=True)]


def _tokens_W(lengths_NW3: Tensor, packing: bool) -> Tensor:
    """Tokens of a micro-batch of N rows on each rank, with padding if there is any. Packed rows with one prompt are
    neighbours and read it once."""
    prompt_NW, response_NW, first_NW = lengths_NW3.unbind(-1)
    if packing:
        repeats_NW = first_NW[1:] == first_NW[:-1]
        return (prompt_NW + response_NW).sum(0) - torch.where(repeats_NW, prompt_NW[1:], 0).sum(0)
    return len(lengths_NW3) * (prompt_NW + response_NW).amax(0)


def _lengths(batch: Rollout | Experience, config: PPOConfig) -> Tensor:
    """lengths_B3: tokens of the prompt, of the response, and (if packed rows share prompts) the first row with this
    prompt."""
    response_B, P = batch.response_mask_BR.sum(1), batch.mask_BT.shape[1] - batch.response_mask_BR.shape[1]
    if config.packing:
        first_B = first_with_prompt(batch.tokens_BT[:, :P], batch.mask_BT[:, :P])
    else:
        first_B = torch.zeros_like(response_B)
    return torch.stack([batch.mask_BT.sum(1) - response_B, response_B, first_B], 1)


def _order(lengths_B3: Tensor, config: PPOConfig) -> Tensor:
    """Longest rows first; if packed rows share prompts, longest prompts first with all their responses."""
    prompt_B, response_B, first_B = lengths_B3.unbind(-1)
    if not config.packing:
        return (prompt_B + response_B).argsort(descending=True, stable=True)
    _, group_B = first_B.unique(return_inverse=True)
    together_B = prompt_B + torch.zeros_like(response_B).scatter_add(0, group_B, response_B)[group_B]
    neighbours_B = group_B.argsort(stable=True)
    return neighbours_B[together_B[neighbours_B].argsort(descending=True, stable=True)]


def _dealt(order_M: Tensor, world: int, config: PPOConfig) -> Tensor:
    """order_NW: each rank's rows, dealt out row by row, or prompt by prompt if rows share prompts."""
    together = config.group_size if config.packing else 1
    return order_M.view(-1, world, together).transpose(1, 2).flatten(0, 1)
