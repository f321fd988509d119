"""Which rows go into which forward pass."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import PPOConfig
from rlhf.data.batches import Experience, Rollout, select, trim
from rlhf.distributed import collectives
from rlhf.distributed.micro_batches import (
    micro_batches_of_minibatch,
    micro_batches_of_shards,
    tokens_of_minibatch,
    tokens_of_shards,
)

P, R = 9, 7


def rollout(lengths, answers=1):
    """Rows of (prompt, response) tokens; each of so many rows in turn has the prompt of its neighbours."""
    prompt_BP = torch.stack([torch.arange(P) >= P - p for p, _ in lengths])
    response_BR = torch.stack([torch.arange(R) < r for _, r in lengths])
    mask_BT = torch.cat([prompt_BP, response_BR], 1)
    tokens_BT = (torch.arange(len(lengths)) // answers)[:, None].expand_as(mask_BT)
    return Rollout(tokens_BT, mask_BT, response_BR, response_BR.float(), response_BR[:, 0])


def experience(lengths, answers=1):
    given, zeros = rollout(lengths, answers), torch.zeros(len(lengths), R)
    of_tokens: Any = {f.name: zeros for f in fields(Experience) if f.name.endswith("_BR")} | {
        "response_mask_BR": given.response_mask_BR
    }
    counted_B = torch.ones(len(lengths), dtype=torch.bool)
    return Experience(given.tokens_BT, given.mask_BT, counted_B=counted_B, denominator_B=zeros[:, 0], **of_tokens)


def read_tokens(batch, index, packing):
    part = trim(select(batch, index))
    if not packing:
        return len(part.mask_BT) * int(part.mask_BT.sum(1).max())
    prompt_B = part.mask_BT.sum(1) - part.response_mask_BR.sum(1)
    prompts = {(int(tokens[0]), int(length)) for tokens, length in zip(part.tokens_BT, prompt_B, strict=True)}
    return int(part.response_mask_BR.sum()) + sum(length for _, length in prompts)


ROW = st.tuples(st.integers(1, P), st.integers(1, R))


@given(st.lists(st.tuples(ROW, ROW, ROW), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 60), st.booleans())
def test_a_minibatch_is_read_once_in_equally_many_passes_within_the_budget(triples, world, budget, packing):
    config = PPOConfig(micro_batch_tokens=budget, packing=packing)
    lengths = [row for triple in triples for row in triple[:world]]
    batch = experience(lengths)
    index = torch.randperm(len(lengths))
    passes = [micro_batches_of_minibatch(batch, index, rank, world, config) for rank in range(world)]
    assert sorted(torch.cat([part for rank in passes for part in rank]).tolist()) == sorted(index.tolist())
    assert len({len(rank) for rank in passes}) == 1
    assert all(len(part) == 1 or read_tokens(batch, part, packing) <= budget for rank in passes for part in rank)
    computed = sum(read_tokens(batch, part, packing) for rank in passes for part in rank)
    assert tokens_of_minibatch(batch, index, world, config) == computed


def test_the_rank_that_has_most_decides_by_hand():
    """Rank 0 has (8, 4) and (8, 1), 12 columns; rank 1 has (9, 1) and (2, 7), 10 columns."""
    batch = experience([(9, 1), (8, 4), (8, 1), (2, 7)])
    for budget, expected in ((24, [[0, 3]]), (23, [[0], [3]])):
        passes = micro_batches_of_minibatch(batch, torch.arange(4), 1, 2, PPOConfig(micro_batch_tokens=budget))
        assert [part.tolist() for part in passes] == expected


def test_the_rank_that_has_most_decides_over_shared_prompts_by_hand():
    """With both answers, rank 0 has prompts of 2 + 7 + 6 and 1 + 2 + 7 tokens, rank 1 of 9 + 1 + 1 and 8 + 1 + 1. Three
    rows are 18 tokens there and 20 here, four are 25 and 21."""
    batch = experience([(2, 7), (2, 6), (9, 1), (9, 1), (1, 2), (1, 7), (8, 1), (8, 1)], 2)
    for budget, expected in ((19, [[2, 3], [6, 7]]), (20, [[2, 3, 6], [7]])):
        config = PPOConfig(micro_batch_tokens=budget, packing=True, group_size=2)
        passes = micro_batches_of_minibatch(batch, torch.arange(8), 1, 2, config)
        assert [part.tolist() for part in passes] == expected


def test_the_budget_is_used_up_by_hand():
    """Longest first: 9 + 1, 3 + 6, 4 + 4, 2 + 2, 1 + 1 tokens; a pass is as wide as its longest row."""
    batch = experience([(2, 2), (9, 1), (4, 4), (1, 1), (3, 6)])
    for packing, budget, expected in (
        (False, 30, [[1, 4, 2], [0, 3]]),  # 3 · 10 = 30; 2 · 4 = 8
        (False, 29, [[1, 4], [2, 0, 3]]),  # 2 · 10 = 20; 3 · 8 = 24
        (False, 9, [[1], [4], [2], [0, 3]]),  # 10 tokens are over the limit and go alone
        (True, 27, [[1, 4, 2], [0, 3]]),  # 10 + 9 + 8 = 27
        (True, 26, [[1, 4], [2, 0, 3]]),  # 8 + 4 + 2 = 14
    ):
        config = PPOConfig(micro_batch_tokens=budget, packing=packing)
        passes = micro_batches_of_minibatch(batch, torch.arange(5), 0, 1, config)
        assert [sorted(part.tolist()) for part in passes] == [sorted(part) for part in expected]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_minibatch_by_rows(world):
    batch = experience([(p, 1) for p in (3, 1, 4, 1, 5, 9, 2)])
    index = torch.tensor([6, 1, 3, 0, 5, 2])
    passes = [
        micro_batches_of_minibatch(batch, index, rank, world, PPOConfig(micro_batch_size=2)) for rank in range(world)
    ]
    assert sorted(torch.cat([part for rank in passes for part in rank]).tolist()) == sorted(index.tolist())
    assert [[len(part) for part in rank] for rank in passes] == [[[2, 2, 2], [2, 1], [2]][world - 1]] * world


def test_a_minibatch_that_cannot_be_shared_evenly_is_an_error_and_no_hang():
    with pytest.raises(RuntimeError):
        micro_batches_of_minibatch(experience([(1, 1)] * 3), torch.arange(3), 0, 2, PPOConfig())


@given(
    st.lists(st.tuples(st.integers(1, P), st.integers(1, R)), min_size=4, max_size=4), st.integers(1, 60), st.booleans()
)
def test_ranks_that_know_only_their_own_rows_agree_on_the_passes(lengths, budget, packing):
    """Two ranks with two rows each; what they say to one another is played by hand."""
    config = PPOConfig(micro_batch_tokens=budget, packing=packing)
    shares = [rollout(lengths[:2]), rollout(lengths[2:])]
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "gather_objects", lambda value: said.append(value) or [value])
        for share in shares:
            micro_batches_of_shards(share, config)
        patch.setattr(collectives, "gather_objects", lambda value: said)
        passes = [micro_batches_of_shards(share, config) for share in shares]
    assert len({len(rank) for rank in passes}) == 1
    for share, parts in zip(shares, passes, strict=True):
        assert sorted(torch.cat(parts).tolist()) == [0, 1]
        assert all(len(part) == 1 or read_tokens(share, part, packing) <= budget for part in parts)
    both = zip(shares, passes, strict=True)
    computed = sum(read_tokens(share, part, packing) for share, parts in both for part in parts)
    assert tokens_of_shards(rollout(lengths), 2, config) == computed


# --- several answers to a prompt --------------------------------------------------------------------------------------

GROUP = st.tuples(st.integers(1, P), st.lists(st.integers(1, R), min_size=6, max_size=6))


@given(
    st.lists(GROUP, min_size=2, max_size=6).filter(lambda groups: len(groups) % 2 == 0),
    st.integers(1, 2),
    st.sampled_from([1, 2, 3, 6]),
    st.integers(1, 90),
)
def test_packed_answers_of_a_prompt_meet_in_a_pass_within_the_budget(groups, world, answers, budget):
    config = PPOConfig(micro_batch_tokens=budget, packing=True, group_size=answers)
    lengths = [(prompt, response) for prompt, responses in groups for response in responses[:answers]]
    batch = experience(lengths, answers)
    index = (torch.randperm(len(groups))[:, None] * answers + torch.arange(answers)).flatten()
    passes = [micro_batches_of_minibatch(batch, index, rank, world, config) for rank in range(world)]
    assert sorted(torch.cat([part for rank in passes for part in rank]).tolist()) == sorted(index.tolist())
    assert len({len(rank) for rank in passes}) == 1
    assert all(len(part) == 1 or read_tokens(batch, part, True) <= budget for rank in passes for part in rank)
    for rank in passes:
        order = (torch.cat(rank) // answers).tolist()
        assert order == [prompt for prompt in dict.fromkeys(order) for _ in range(answers)]
    computed = sum(read_tokens(batch, part, True) for rank in passes for part in rank)
    assert tokens_of_minibatch(batch, index, world, config) == computed
    shares = [select(rollout(lengths, answers), collectives.shard(len(lengths), rank, world)) for rank in range(world)]
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "gather_objects", lambda value: said.append(value) or [value])
        for share in shares:
            micro_batches_of_shards(share, config)
        patch.setattr(collectives, "gather_objects", lambda value: said)
        passes = [micro_batches_of_shards(share, config) for share in shares]
    computed = sum(read_tokens(share, part, True) for share, own in zip(shares, passes, strict=True) for part in own)
    assert tokens_of_shards(rollout(lengths, answers), world, config) == computed


def test_two_answers_to_each_prompt_by_hand():
    """Tokens of prompts and both answers: 9 + 1 + 1, 2 + 7 + 6 and 4 + 2 + 1, the longest first."""
    batch = experience([(9, 1), (9, 1), (2, 7), (2, 6), (4, 2), (4, 1)], 2)
    for budget, expected in (
        (25, [[2, 3, 0], [1, 4, 5]]),  # 15 + 9 + 1; then the prompt once more, 9 + 1 + 7
        (26, [[2, 3, 0, 1], [4, 5]]),
        (33, [[2, 3, 0, 1, 4, 5]]),
    ):
        config = PPOConfig(micro_batch_tokens=budget, packing=True, group_size=2)
        passes = micro_batches_of_minibatch(batch, torch.arange(6), 0, 1, config)
        assert [part.tolist() for part in passes] == expected
    config = PPOConfig(micro_batch_tokens=99, packing=True, group_size=2)
    dealt = [micro_batches_of_minibatch(batch, torch.tensor([4, 5, 2, 3]), rank, 2, config) for rank in range(2)]
    assert [[part.tolist() for part in rank] for rank in dealt] == [[[2, 3]], [[4, 5]]]


def test_padded_rows_go_by_their_own_length_whatever_their_prompt():
    batch = experience([(3, 1), (3, 7), (3, 2), (3, 6)], 2)
    config = PPOConfig(micro_batch_size=2, group_size=2)
    assert [part.tolist() for part in micro_batches_of_minibatch(batch, torch.arange(4), 0, 1, config)] == [
        [1, 3],
        [2, 0],
    ]
