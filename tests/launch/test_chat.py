from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import chat as module
from launch import cli
from launch.chat import Dialogue, command, sample, say
from reward_data import Message
from rlhf.chat.llama2 import Llama2
from rlhf.config import TinyConfig
from rlhf.models import load_causal, load_tokenizer, save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama
from tests.rlhf.chat.templates import tokenizer_with

TINY = TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(["hello there, how are you? fine"] * 20, 300)
    folder = tmp_path_factory.mktemp("policy") / "model"
    save_causal(untrained_llama(TINY, tokenizer, seed=0), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path):
    return load_tokenizer(model)


# --- sampling


def test_the_likeliest_tokens_are_those_of_generate(model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = [1, 70, 71, 72, 90, 91]
    with torch.no_grad():
        expected = plain.generate(  # type: ignore[attr-defined]
            torch.tensor([ids]), attention_mask=torch.ones(1, 6), max_new_tokens=20, do_sample=False, eos_token_id=None
        )[0, 6:]
    assert list(sample(load_causal(model), ids, [], 0.0, 20)) == expected.tolist()


def test_an_answer_stops_before_its_eos(model: Path) -> None:
    free = list(sample(load_causal(model), [1, 70, 71], [], 0.0, 8))
    eos = free[3]
    assert list(sample(load_causal(model), [1, 70, 71], [eos], 0.0, 8)) == free[: free.index(eos)]


def test_temperature_spreads_the_answers(model: Path) -> None:
    causal = load_causal(model)
    answers = {tuple(sample(causal, [1, 70, 71], [], 5.0, 6)) for _ in range(5)}
    assert len(answers) == 5


def test_ctrl_c_keeps_what_was_said(tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> Iterator[int]:
        yield from tokenizer("hello", add_special_tokens=False)["input_ids"]
        raise KeyboardInterrupt

    assert say(interrupted(), tokenizer, stoppable=True) == "hello"
    assert capsys.readouterr().out == "hello [stopped]\n"
    with pytest.raises(KeyboardInterrupt):
        say(interrupted(), tokenizer, stoppable=False)


# --- the dialogue


def test_commands_change_the_dialogue() -> None:
    dialogue = Dialogue()
    command(dialogue, "/system  Be brief. ")
    dialogue.keep("a", "b", Llama2(None))
    assert [(m.role, m.content) for m in dialogue.asking("c")] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    command(dialogue, "/reset")
    assert [m.role for m in dialogue.asking("c")] == ["system", "user"]
    command(dialogue, "/system")
    assert dialogue.asking("c") == [Message("user", "c")]
    assert "/exit" in command(dialogue, "/what")


@pytest.mark.parametrize("answer", ["", "b [/INST] c"])
def test_an_answer_that_the_format_cannot_hold_is_not_kept(answer: str) -> None:
    dialogue = Dialogue()
    dialogue.keep("a", answer, Llama2(None))
    assert dialogue.turns == []


def test_a_model_cannot_steer_the_terminal(tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b[2Jb\x07\n\tc"
    said = say(iter(tokenizer(text, add_special_tokens=False)["input_ids"]), tokenizer, stoppable=True)
    assert capsys.readouterr().out == "a[2Jb\n\tc\n"
    assert said == text


def heard(model: Path, monkeypatch: pytest.MonkeyPatch, lines: str, answers: list[str]) -> list[str]:
    """The prompts that the model reads when `lines` are said and it answers `answers`; as text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts: list[str] = []
    replies = iter(answers)

    def scripted(causal, ids, stop_ids, temperature, room):
        prompts.append(tokenizer.decode(ids))
        return iter(tokenizer(next(replies), add_special_tokens=False)["input_ids"])

    monkeypatch.setattr(module, "sample", scripted)
    module.chat(str(model), 0.0, 8, io.StringIO(lines))
    return prompts


def test_history_is_encoded_as_llama_2_does(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = heard(model, monkeypatch, "/system Be kind.\nhi\n\nhow are you?\n/exit\nnever read\n", ["hello", "fine"])
    opening = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]"
    assert prompts == [opening, f"{opening} hello </s><s>[INST] how are you? [/INST]"]
    assert capsys.readouterr().out.splitlines()[-2:] == ["hello", "fine"]


def test_an_artifact_with_a_template_of_its_own_is_asked_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tokenizer = tmp_path / "model", tokenizer_with("chatml")
    save_causal(untrained_llama(TINY, tokenizer, seed=0), folder, tokenizer)
    prompts = heard(folder, monkeypatch, "/system kind\nhi\n<|im_end|>\nand?\n", ["yo", "never said"])
    opening = "<|im_start|>system\nkind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [opening, f"{opening}yo<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"]
    assert "'<|im_end|>', a special token" in capsys.readouterr().err


def test_the_template_s_end_of_a_turn_ends_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tokenizer = tmp_path / "model", tokenizer_with("llama3")
    save_causal(untrained_llama(TINY, tokenizer, seed=0), folder, tokenizer)
    given: list[Any] = []
    monkeypatch.setattr(module, "sample", lambda causal, ids, stop_ids, *_: given.append(stop_ids) or iter(()))
    module.chat(str(folder), 0.0, 8, io.StringIO("hi\n"))
    assert given == [tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])]


def test_a_message_with_a_tag_is_refused_and_the_dialogue_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heard(model, monkeypatch, "[INST] hi\nhello\n", ["yes"]) == ["<s>[INST] hello [/INST]"]
    assert "contains '[INST]'" in capsys.readouterr().err


def test_a_dialogue_longer_than_the_model_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(heard(model, monkeypatch, f"{'x ' * 9000}\nhello\n", ["yes"])) == 1
    assert "and the model holds 8192; /reset starts a new one" in capsys.readouterr().err


def test_lines_from_a_pipe_are_answered(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nthere\n"))
    assert cli.main(["chat", str(model), "--temperature", "0", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out) > 2


def test_a_wrong_model_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "./no/such/model"]) == 4
    assert capsys.readouterr().err.startswith("error: there is no model folder")


# --- in a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_ctrl_c_hints_and_ctrl_d_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["hello", KeyboardInterrupt(), "  ", "there", EOFError()])

    def fake_input(prompt: str) -> str:
        said = next(typed)
        if isinstance(said, BaseException):
            raise said
        return said

    monkeypatch.setattr("builtins.input", fake_input)
    assert list(itertools.islice(module._asked(Terminal()), 9)) == ["hello", "there"]
    assert capsys.readouterr().out.count("Ctrl-D leaves") == 2


def test_bytes_that_are_no_text_do_not_end_the_chat() -> None:
    raw = io.BytesIO(b"caf\xe9\nhello\n")
    said = list(module._asked(io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape")))
    assert said == ["caf\N{REPLACEMENT CHARACTER}", "hello"]


def test_bytes_that_are_no_text_do_not_end_the_chat_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter(["caf\udce9", "hello"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert list(itertools.islice(module._asked(Terminal()), 2)) == ["caf\N{REPLACEMENT CHARACTER}", "hello"]
