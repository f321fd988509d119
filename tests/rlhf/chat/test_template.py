"""Templates of tokenizers: ids against transformers' own rendering, masks against texts that a turn must be."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.chat import check_format, format_of
from rlhf.chat.template import TokenizerTemplate
from rlhf.errors import UserError
from tests.rlhf.chat.templates import CHATML, ENDS, tokenizer_with
from tests.rlhf.chat.test_llama2 import Message, assistant, user


@cache
def chat_of(name) -> TokenizerTemplate:
    chat = format_of(tokenizer_with(name))
    assert isinstance(chat, TokenizerTemplate)
    return chat


def rendered(chat, messages, generation_prompt=False):
    dicts = [message._asdict() for message in messages]
    return chat.tokenizer.apply_chat_template(dicts, add_generation_prompt=generation_prompt, return_dict=False)


def spans(ids, mask):
    """The runs of ids under the mask."""
    bits = "".join(map(str, mask))
    return [ids[run.start() : run.end()] for run in re.finditer("1+", bits)]


DIALOGUE = [user("hi, you"), assistant("yo"), user("and?"), assistant(" that was all ")]


@pytest.mark.parametrize("name", ENDS)
def test_the_mask_is_on_each_response_and_its_end(name):
    chat = chat_of(name)
    ids, mask = chat.encode(DIALOGUE)
    texts = ["".join(chat.tokenizer.decode(run).split()) for run in spans(ids, mask)]
    assert texts == [f"yo{ENDS[name]}", f"thatwasall{ENDS[name]}"]


@pytest.mark.parametrize("name", ENDS)
def test_ids_are_those_of_plain_transformers(name):
    chat = chat_of(name)
    ids, mask = chat.encode(DIALOGUE)
    whole = rendered(chat, DIALOGUE)
    assert whole[: len(ids)] == ids and mask[-1] == 1
    assert chat.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True).strip() == ""
    assert chat.encode_prompt(DIALOGUE[:3]) == rendered(chat, DIALOGUE[:3], generation_prompt=True)
    assert chat.encode_response(DIALOGUE[:3], DIALOGUE[3].content) == ids


def test_chatml_by_hand():
    chat = chat_of("chatml")
    ids, mask = chat.encode([Message("system", "kind"), user("hi"), assistant("yo")])
    text = "<|im_start|>system\nkind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"
    assert chat.tokenizer.decode(ids) == text
    assert mask == [0] * (len(ids) - 3) + [1, 1, 1]  # two letters and the end


@pytest.mark.parametrize("name", ENDS)
def test_a_response_ends_at_every_eos_and_at_the_end_of_its_turn(name):
    chat = chat_of(name)
    tokenizer = chat.tokenizer
    assert chat.stop_ids == list(dict.fromkeys([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ENDS[name])]))
    for stop in chat.stop_ids:
        assert chat.decode([*tokenizer(" yo")["input_ids"], stop, *tokenizer("never read")["input_ids"]]) == "yo"


def test_a_tokenizer_that_adds_bos_itself_gives_the_one_of_the_template():
    tokenizer = tokenizer_with("llama3")
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id
    assert format_of(tokenizer).encode(DIALOGUE)[0].count(tokenizer.bos_token_id) == 1


def test_eos_ids_of_the_model_are_stop_ids():
    tokenizer = tokenizer_with("chatml")
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.model_eos_ids = [tokenizer.eos_token_id, other]
    assert format_of(tokenizer).stop_ids == [tokenizer.eos_token_id, other]


@pytest.mark.parametrize("messages", [DIALOGUE, DIALOGUE[:3]])
def test_a_template_that_takes_no_system_message_says_so(messages):
    chat = chat_of("mistral")
    with pytest.raises(UserError, match="roles system, user.*roles must alternate.*set model.chat_format") as error:
        chat.validate([Message("system", "kind"), *messages])
    assert error.value.exit_code == 3
    chat.validate(messages)


def test_a_template_whose_prompts_are_no_prefixes_is_refused():
    chat = chat_of("forgetful")
    chat.encode(DIALOGUE[:2])
    with pytest.raises(UserError, match="response 1 of 2: .* cannot be masked"):
        chat.encode(DIALOGUE)
    with pytest.raises(UserError, match="cannot be masked"):
        chat.validate(DIALOGUE)
    with pytest.raises(UserError, match="cannot be masked"):
        check_format(chat)


def test_a_merge_over_the_seam_is_refused_with_its_response():
    letters = sorted(set("[INST] hi [/INST] yo bye"))
    vocab = {token: id for id, token in enumerate([*letters, "] "])}
    backend = Tokenizer(models.BPE(vocab, merges=[("]", " ")]))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = tokenizer_with("mistral").chat_template.replace("message['content'] +", "' yo' +")
    with pytest.raises(UserError, match="response 1: the tokenizer merges"):
        format_of(tokenizer).encode([user("hi"), assistant("yo")])


def test_white_space_that_merges_with_the_prompt_is_told_before_rows_are_encoded():
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(letters)}, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    chat = format_of(tokenizer)
    chat.validate([user("hi"), assistant("yo\n\n")])
    with pytest.raises(UserError, match="response 1: the tokenizer merges"):
        chat.validate([user("hi"), assistant("\nyo")])


def test_a_template_that_ends_no_turn_is_refused():
    with pytest.raises(UserError, match="ends a response with no special token"):
        check_format(chat_of("endless"))


@pytest.mark.parametrize("name", ENDS)
def test_special_tokens_inside_messages_are_refused(name):
    chat = chat_of(name)
    for wrong in ([user(f"hi {ENDS[name]}"), assistant("yo")], [user("hi"), assistant(f"{ENDS[name]} yo")]):
        with pytest.raises(UserError, match="a special token"):
            chat.encode(wrong)
        with pytest.raises(UserError, match="a special token"):
            chat.validate(wrong)
    with pytest.raises(UserError, match=r"message 1 \(user\) contains"):
        chat.encode_prompt([user(ENDS[name])])


@pytest.mark.parametrize("name", ENDS)
def test_wrong_last_role_is_refused(name):
    chat = chat_of(name)
    with pytest.raises(UserError, match="ends with the user"):
        chat.encode(DIALOGUE[:3])
    with pytest.raises(UserError, match="ends with the assistant"):
        chat.encode_prompt(DIALOGUE)
    with pytest.raises(UserError, match="ends with no message"):
        chat.validate([])


plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: "<" not in text and "[" not in text
)


@given(st.sampled_from(sorted(ENDS)), st.lists(st.tuples(plain, plain), min_size=1, max_size=3))
def test_any_text_is_masked_between_its_prompt_and_its_end(name, pairs):
    """The oracle: under the mask stands what transformers renders for the response, and before each such run what it
    renders as the prompt."""
    chat = chat_of(name)
    messages = [message for question, answer in pairs for message in (user(question), assistant(answer))]
    ids, mask = chat.encode(messages)
    end = chat.tokenizer.convert_tokens_to_ids(ENDS[name])
    start = 0
    for number, (_, answer) in enumerate(pairs):
        prompt = rendered(chat, messages[: 2 * number + 1], generation_prompt=True)
        assert ids[: len(prompt)] == prompt
        assert not any(mask[start : len(prompt)])
        start = ids.index(end, len(prompt)) + 1
        assert all(mask[len(prompt) : start])
        assert chat.decode(ids[len(prompt) : start]) == answer.strip()
    assert start == len(ids)
