"""Text while it is sampled: never half a character, nothing that a later token changes, nothing of a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlhf.chat.stream import TextStream
from rlhf.models.tiny import train_tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["hello there, how are you? fine"] * 20, 300)


@pytest.fixture(scope="module")
def llama_like() -> Any:
    """As SentencePiece's of Llama 2: ▁ for a space, bytes for what is not in the vocabulary, no space at the start."""
    words = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "▁a", "▁hello", "lo", "é"]
    backend = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    """As a server asks: nothing after the stop string."""
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.finish()]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@given(text=st.text())
def test_the_pieces_of_a_stream_are_the_text(tokenizer, text: str) -> None:
    assert "".join(pieces(TextStream(tokenizer), ids_of(tokenizer, text))) == text.strip()
    assert "".join(pieces(TextStream(tokenizer, strip=False), ids_of(tokenizer, text))) == text


@given(units=st.lists(st.sampled_from(["▁", "a", "▁a", "▁hello", "lo", "é", *"中🙂\n"]), max_size=12))
def test_spaces_of_a_window_are_not_those_of_a_beginning(llama_like, units: list[str]) -> None:
    """Its decoder drops a space at the start of what it is given. Characters without an id are given by their bytes."""
    vocabulary = llama_like.get_vocab()
    ids = [token for unit in ["lo", *units] for token in ([vocabulary[unit]] if unit in vocabulary else _bytes(unit))]
    assert "".join(pieces(TextStream(llama_like, strip=False), ids)) == "".join(["lo", *units]).replace("▁", " ")


def _bytes(unit: str) -> list[int]:
    return [1 + byte for byte in unit.encode()]


@given(text=st.text(alphabet="aé中🙂"))
def test_no_piece_holds_half_a_character(tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    for token in ids_of(tokenizer, text):
        assert UNFINISHED not in stream.push(token)


def test_a_character_appears_with_its_last_byte(tokenizer) -> None:
    stream, ids = TextStream(tokenizer), ids_of(tokenizer, "🙂")
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🙂"]


def test_an_answer_that_ends_in_half_a_character_says_so_at_its_end(tokenizer) -> None:
    stream = TextStream(tokenizer)
    for token in ids_of(tokenizer, "a🙂")[:-1]:
        stream.push(token)
    assert stream.finish() != ""
    assert stream.text.startswith("a" + UNFINISHED)


def test_words_appear_before_the_answer_is_complete(tokenizer) -> None:
    stream, ids = TextStream(tokenizer), ids_of(tokenizer, "hello there, how are you?")
    half = "".join(stream.push(token) for token in ids[: len(ids) // 2])
    assert "hello there, how are you?".startswith(half)
    assert half != ""


# --- stop strings


def test_a_stop_string_ends_the_text_though_tokens_cut_it_elsewhere(tokenizer) -> None:
    ids = [token for char in "one STOP two" for token in ids_of(tokenizer, char)]
    stream = TextStream(tokenizer, ["STOP"], strip=False)
    found = pieces(stream, ids)
    assert "".join(found) == "one " == stream.text
    assert stream.stopped
    assert len(found) == len("one STOP")  # it ends with the token that completes it


@given(text=st.text(alphabet="ab中", max_size=12), stop=st.lists(st.text("ab中", min_size=1, max_size=4), max_size=3))
def test_the_text_goes_up_to_the_stop_string_that_is_complete_first(tokenizer, text: str, stop: list[str]) -> None:
    """Oracle: the shortest beginning of the text that holds a stop string, cut at the first one in it."""
    begins = (text[:n] for n in range(len(text) + 1))
    holder = next((part for part in begins if any(each in part for each in stop)), None)
    expected = text if holder is None else holder[: min(holder.find(each) for each in stop if each in holder)]
    stream = TextStream(tokenizer, stop, strip=False)
    ids = [token for char in text for token in ids_of(tokenizer, char)]
    assert ("".join(pieces(stream, ids)), stream.stopped) == (expected, holder is not None)


def test_what_only_began_like_a_stop_string_is_given_at_the_end(tokenizer) -> None:
    stream = TextStream(tokenizer, ["###"], strip=False)
    assert "".join(stream.push(token) for token in ids_of(tokenizer, "a ##")) == "a "
    assert stream.finish() == "##"
