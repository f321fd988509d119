"""Rows as tokens, and prompts as batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_data import Prompt
from rlhf.chat import format_of
from rlhf.data import (
    MARGINS,
    encode_demonstrations,
    encode_preferences,
    pad,
    prompt_batch,
    short_prompts,
)
from rlhf.errors import UserError
from tests.rlhf.data.rows import asked, demonstration, preference

# --- encoding ---


def test_margins_are_those_of_the_paper():
    ratings = ("significantly", "better", "slightly", "negligibly", "unrated")
    assert [MARGINS["large"][rating] for rating in ratings] == [3, 2, 1, 0, 0]
    assert [MARGINS["small"][rating] for rating in ratings] == [1, 2 / 3, 1 / 3, 0, 0]
    assert not any(MARGINS["none"][rating] for rating in ratings)


def test_demonstrations_have_the_columns_of_trl(tokenizer):
    row = demonstration("hello")
    ids, mask = format_of(tokenizer).encode(row.messages)
    assert encode_demonstrations(tokenizer, [row], 100) == [{"input_ids": ids, "assistant_masks": mask}]


def test_preferences_have_the_columns_of_trl(tokenizer):
    row = preference("hello", rating="slightly", safety=("safe", "unknown"))
    assert encode_preferences(tokenizer, [row], "large", 100) == [
        {
            "chosen_ids": format_of(tokenizer).encode_response(row.prompt, "yes"),
            "rejected_ids": format_of(tokenizer).encode_response(row.prompt, "no"),
            "margin": 1.0,
            "chosen_is_safe": 1,
            "rejected_is_safe": -1,
        }
    ]
    assert (
        encode_preferences(tokenizer, [preference("a", safety=("unsafe", "safe"))], "none", 100)[0]["chosen_is_safe"]
        == 0
    )


def test_long_rows_are_left_out_whole(tokenizer):
    short, long = demonstration("hello"), demonstration("hello", "yes " * 50)
    limit = len(format_of(tokenizer).encode(short.messages)[0])
    assert encode_demonstrations(tokenizer, [short, long], limit) == encode_demonstrations(tokenizer, [short], 999)
    for pair in (preference("a", chosen="yes " * 50), preference("a", rejected="yes " * 50)):
        assert len(encode_preferences(tokenizer, [pair, preference("a")], "none", 40)) == 1
    prompts = [Prompt(asked(text), "helpful", "") for text in ("hi", "hi " * 50)]
    assert [prompt.messages for prompt in short_prompts(tokenizer, prompts, 20)] == [prompts[0].messages]


def test_a_length_that_no_row_meets_is_refused(tokenizer):
    with pytest.raises(UserError, match="all 1 demonstrations are over 3 tokens"):
        encode_demonstrations(tokenizer, [demonstration("hello")], 3)


# --- batches ---


def test_prompts_are_padded_on_the_left(tokenizer):
    prompts = [Prompt(asked("hello"), "safety", "p:1"), Prompt(asked("hello, how are you?"), "helpful", "p:2")]
    batch = prompt_batch(tokenizer, prompts, [7, 3], max_prompt_length=50)
    ids = [format_of(tokenizer).encode_prompt(prompt.messages) for prompt in prompts]
    missing = len(ids[1]) - len(ids[0])
    assert missing > 0
    assert batch.tokens_BP.tolist() == [[tokenizer.pad_token_id] * missing + ids[0], ids[1]]
    assert batch.mask_BP.tolist() == [[False] * missing + [True] * len(ids[0]), [True] * len(ids[1])]
    assert batch.is_safety_B.tolist() == [True, False]
    assert batch.ids_B.tolist() == [7, 3]


def test_prompts_are_encoded_once(tokenizer, monkeypatch):
    prompts = [Prompt(asked(text), "safety", f"p:{text}") for text in ("hi", "hello you")]
    expected = prompt_batch(tokenizer, prompts, [0, 1], 50)
    short = short_prompts(tokenizer, prompts, 50)
    monkeypatch.setattr(type(format_of(tokenizer)), "encode_prompt", lambda *_: pytest.fail("encoded again"))
    batch = prompt_batch(tokenizer, short, [0, 1], 50)
    assert all(getattr(batch, name).equal(value) for name, value in vars(expected).items())
    assert [(row.tag, row.source) for row in short] == [(row.tag, row.source) for row in prompts]


def test_prompt_that_is_too_long_for_a_batch_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"p:1: the prompt has \d+ tokens, over 5"):
        prompt_batch(tokenizer, [Prompt(asked("hello"), "helpful", "p:1")], [0], 5)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1), st.booleans())
def test_masks_come_from_lengths_even_when_pad_is_a_real_token(sequences, left):
    tokens, mask = pad(sequences, 0, left=left)
    assert [row[real].tolist() for row, real in zip(tokens, mask, strict=True)] == sequences
    assert (tokens[~mask] == 0).all()
    edge = 0 if not left else -1
    assert mask[:, edge].all()
