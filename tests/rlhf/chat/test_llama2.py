"""The chat encoding against ids worked by hand: each word, space and line end is one token of a tiny vocabulary."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.chat.llama2 import TAGS, TEMPLATE, Llama2
from rlhf.errors import UserError

UNK, BOS, EOS, PAD, OPEN, CLOSE, SPACE, LINE, SYS, END_SYS, HI, YO, BYE, KIND = range(14)
WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "[INST]",
    "[/INST]",
    " ",
    "\n",
    "<<SYS>>",
    "<</SYS>>",
    "hi",
    "yo",
    "bye",
    "kind",
]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


class Message(NamedTuple):
    role: str
    content: str


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


@pytest.fixture
def word_tokenizer():
    vocab = {word: id for id, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |[^ \n]+"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.fixture(scope="module")
def byte_tokenizer():
    vocab = {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def test_closed_turn(word_tokenizer):
    ids, mask = Llama2(word_tokenizer).encode([user(" hi\n"), assistant("yo bye ")])
    assert ids == [BOS, OPEN, SPACE, HI, SPACE, CLOSE, SPACE, YO, SPACE, BYE, SPACE, EOS]
    assert mask == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_open_turn_has_no_eos_and_no_last_space(word_tokenizer):
    assert Llama2(word_tokenizer).encode_prompt([user("hi")]) == [BOS, OPEN, SPACE, HI, SPACE, CLOSE]


def test_each_turn_has_its_own_bos_and_eos(word_tokenizer):
    ids, mask = Llama2(word_tokenizer).encode([user("hi"), assistant("yo"), user("bye"), assistant("hi")])
    first = [BOS, OPEN, SPACE, HI, SPACE, CLOSE, SPACE, YO, SPACE, EOS]
    second = [BOS, OPEN, SPACE, BYE, SPACE, CLOSE, SPACE, HI, SPACE, EOS]
    assert ids == first + second
    assert mask == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1] * 2


def test_earlier_turns_of_a_prompt_are_closed(word_tokenizer):
    ids = Llama2(word_tokenizer).encode_prompt([user("hi"), assistant("yo"), user("bye")])
    first = [BOS, OPEN, SPACE, HI, SPACE, CLOSE, SPACE, YO, SPACE, EOS]
    assert ids == [*first, BOS, OPEN, SPACE, BYE, SPACE, CLOSE]


def test_system_text_stands_in_the_first_user_text(word_tokenizer):
    ids = Llama2(word_tokenizer).encode_prompt([Message("system", "kind"), user("hi")])
    system = [SYS, LINE, KIND, LINE, END_SYS, LINE, LINE]
    assert ids == [BOS, OPEN, SPACE, *system, HI, SPACE, CLOSE]


def test_answer_joins_its_prompt(word_tokenizer):
    ids = Llama2(word_tokenizer).encode_response([user("hi")], "yo")
    assert ids == [BOS, OPEN, SPACE, HI, SPACE, CLOSE, SPACE, YO, SPACE, EOS]


def test_tokenizer_that_adds_bos_itself_gives_one_bos(word_tokenizer):
    word_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    assert word_tokenizer("hi")["input_ids"] == [BOS, HI]
    assert Llama2(word_tokenizer).encode_prompt([user("hi")]).count(BOS) == 1


def test_written_special_tokens_stay_text(byte_tokenizer):
    ids, _ = Llama2(byte_tokenizer).encode([user("say </s>"), assistant("</s> <s>")])
    assert ids.count(byte_tokenizer.eos_token_id) == 1
    assert ids.count(byte_tokenizer.bos_token_id) == 1


def test_merge_over_the_seam_is_refused_with_its_turn():
    letters = sorted(set("[INST] hi [/INST] yo bye"))
    vocab = {token: id for id, token in enumerate([*letters, "] "])}
    backend = Tokenizer(models.BPE(vocab, merges=[("]", " ")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    with pytest.raises(UserError, match="turn 1.*'yo'") as error:
        Llama2(tokenizer).encode([user("hi"), assistant("yo")])
    assert error.value.exit_code == 3


@pytest.mark.parametrize("tag", TAGS)
def test_tags_inside_messages_are_refused(word_tokenizer, tag):
    with pytest.raises(UserError, match=r"message 2 \(assistant\) contains"):
        Llama2(word_tokenizer).encode([user("hi"), assistant(f"yo {tag}")])
    with pytest.raises(UserError, match="the answer contains"):
        Llama2(word_tokenizer).encode_response([user("hi")], f"yo {tag}")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [Message("system", "kind")],
        [assistant("yo")],
        [user("hi"), user("hi"), assistant("yo")],
        [user("hi"), Message("system", "kind"), assistant("yo")],
        [user("hi"), Message("tool", "yo")],
    ],
)
def test_roles_out_of_order_are_refused(word_tokenizer, messages):
    with pytest.raises(UserError, match="the roles are"):
        Llama2(word_tokenizer).encode(messages)


def test_wrong_last_role_is_refused(word_tokenizer):
    closed = [user("hi"), assistant("yo")]
    with pytest.raises(UserError, match="ends with the user"):
        Llama2(word_tokenizer).encode([user("hi")])
    with pytest.raises(UserError, match="ends with the assistant"):
        Llama2(word_tokenizer).encode_prompt(closed)
    with pytest.raises(UserError, match="ends with the assistant"):
        Llama2(word_tokenizer).encode_response(closed, "yo")


def test_decoded_answer_ends_at_the_first_eos(word_tokenizer):
    assert Llama2(word_tokenizer).decode([SPACE, YO, SPACE, HI, SPACE, EOS, BYE, EOS]) == "yo hi"


def test_template_for_other_tools_is_the_same_format(word_tokenizer):
    messages = [Message("system", "kind"), user("hi "), assistant(" yo"), user("bye")]
    dicts = [message._asdict() for message in messages]
    for end in (3, 4):
        theirs = word_tokenizer.apply_chat_template(dicts[:end], chat_template=TEMPLATE, return_dict=False)
        chat = Llama2(word_tokenizer)
        assert theirs == (chat.encode_prompt(messages[:end]) if end == 4 else chat.encode(messages[:end])[0])


texts = st.text(min_size=1).filter(lambda text: not any(tag in text for tag in TAGS))


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_any_text_keeps_the_prompt_a_prefix_and_the_answer_readable(byte_tokenizer, pairs):
    messages = [message for question, answer in pairs for message in (user(question), assistant(answer))]
    ids, mask = Llama2(byte_tokenizer).encode(messages)
    prompt = Llama2(byte_tokenizer).encode_prompt(messages[:-1])
    last_answer = messages[-1].content
    assert ids[: len(prompt)] == prompt
    assert all(mask[len(prompt) :])
    assert Llama2(byte_tokenizer).decode(ids[len(prompt) :]) == last_answer.strip()
    assert Llama2(byte_tokenizer).encode_response(messages[:-1], last_answer) == ids
