"""Rows and columns of the tensor nouns."""

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import pad
from rlhf.data.batches import Experience, PromptBatch, first_with_prompt, select, trim
from rlhf.models.policy import PolicyModel

OF_TOKENS = [f for f in dataclasses.fields(Experience) if f.name.endswith("_BR") and f.name != "response_mask_BR"]


def test_rows_are_taken_from_every_field():
    number_BT = torch.arange(6).view(3, 2)
    batch = PromptBatch(number_BT, number_BT > 2, torch.tensor([True, False, True]), torch.arange(3))
    for index in ([2, 0], torch.tensor([2, 0])):
        picked = select(batch, index)
        for name, value in vars(batch).items():
            assert getattr(picked, name).tolist() == [value[2].tolist(), value[0].tolist()]
    assert select(batch, slice(1, None)).ids_B.tolist() == [1, 2]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=5))
def test_trimming_leaves_every_real_token_and_its_numbers(lengths):
    P, R, B = 5, 6, len(lengths)
    prompt_BP = torch.stack([torch.arange(P) >= P - p for p, _ in lengths])
    response_BR = torch.stack([torch.arange(R) < r for _, r in lengths])
    number_BR, number_B = torch.arange(float(B * R)).view(B, R), torch.arange(float(B))
    whole = Experience(
        tokens_BT=torch.arange(B * (P + R)).view(B, P + R),
        mask_BT=torch.cat([prompt_BP, response_BR], 1),
        response_mask_BR=response_BR,
        counted_B=number_B % 2 == 0,
        **{field.name: number_BR + k for k, field in enumerate(OF_TOKENS)},
        denominator_B=number_B,
    )
    small = trim(whole)
    assert small.tokens_BT[small.mask_BT].tolist() == whole.tokens_BT[whole.mask_BT].tolist()
    assert torch.equal(small.counted_B, whole.counted_B) and torch.equal(small.denominator_B, whole.denominator_B)
    for field in OF_TOKENS:
        kept, all_of_it = getattr(small, field.name), getattr(whole, field.name)
        assert kept[small.response_mask_BR].tolist() == all_of_it[response_BR].tolist()
    assert small.response_mask_BR.shape[1] == max(1, *(r for _, r in lengths))
    assert small.tokens_BT.shape[1] == max(p for p, _ in lengths) + small.response_mask_BR.shape[1]


def test_trimming_changes_no_logprob(make_llama, iteration):
    part = select(iteration.experience, [1, 3, 7])
    small = trim(part)
    assert small.tokens_BT.shape[1] < part.tokens_BT.shape[1]
    policy = PolicyModel(make_llama(0))
    before, _ = policy(part.tokens_BT, part.mask_BT, 9, 0.7)
    R = small.response_mask_BR.shape[1]
    after, _ = policy(small.tokens_BT, small.mask_BT, R, 0.7)
    assert (after - before[:, :R])[small.response_mask_BR].abs().max() < 1e-5


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=9))
def test_equal_prompts_are_found_and_no_others(prompts):
    """Of two tokens, one of which also fills the padding."""
    got = first_with_prompt(*pad(prompts, 0, left=True)).tolist()
    assert got == [prompts.index(prompt) for prompt in prompts]
