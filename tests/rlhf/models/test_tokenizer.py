"""Tokenizers of model folders: which ids end a response, which token pads, and whose chat template they carry."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from rlhf.chat import format_of, llama2
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, save_causal
from rlhf.runs.chat_format import check_inputs, message_check, notice
from tests.rlhf.chat.templates import CHATML, tokenizer_with
from tests.rlhf.chat.test_llama2 import Message, assistant, user

NO_ROWS: Any = {role: {"train": []} for role in ("demonstrations", "preferences", "prompts")}


@pytest.fixture
def folder_with(tmp_path):
    """A model folder with a tokenizer, and what its generation settings say."""

    def folder_with(tokenizer, **generation):
        torch.manual_seed(0)
        shape: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "model/generation_config.json").write_text(json.dumps(generation))
        return tmp_path / "model"

    return folder_with


def ids(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


def run(folder, chat_format="auto"):
    model: Any = {"path": str(folder), "chat_format": chat_format}
    return RunConfig(name="run", model=model, data=NO_ROWS)


def test_a_template_stays_goes_or_is_asked_for(folder_with):
    own = folder_with(tokenizer_with("chatml"))
    assert load_tokenizer(own).chat_template == CHATML
    assert load_tokenizer(own, "tokenizer").chat_template == CHATML
    assert load_tokenizer(own, "llama2").chat_template == llama2.TEMPLATE


def test_without_a_template_it_is_llama_2(folder_with):
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = None
    bare = folder_with(tokenizer)
    assert load_tokenizer(bare).chat_template == llama2.TEMPLATE
    with pytest.raises(UserError, match=r"brings no chat template: set llama2, or put .*chat_template.jinja"):
        load_tokenizer(bare, "tokenizer")
    (bare / "chat_template.jinja").write_text(CHATML)
    assert format_of(load_tokenizer(bare, "tokenizer")).name == "tokenizer"


def test_all_special_eos_ids_of_the_model_end_a_response_and_pad_is_none_of_them(folder_with):
    tokenizer = tokenizer_with("chatml")
    end, also, word = ids(tokenizer, "<|im_end|>", "<|endoftext|>", "a")
    tokenizer.pad_token = "<|endoftext|>"  # as Qwen has it
    loaded = load_tokenizer(folder_with(tokenizer, eos_token_id=[end, also, word]))
    assert format_of(loaded).stop_ids == [end, also]
    assert loaded.pad_token == "<pad>"


def test_pad_is_no_token_that_the_template_writes(folder_with):
    tokenizer = tokenizer_with("chatml")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|spare|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    folder = folder_with(tokenizer)
    config = json.loads((folder / "tokenizer.json").read_text())
    kept = [token for token in config["added_tokens"] if token["content"] not in ("<pad>", "<|endoftext|>")]
    (folder / "tokenizer.json").write_text(json.dumps(config | {"added_tokens": kept}))
    assert load_tokenizer(folder).pad_token == "<|spare|>"


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3"])
def test_an_artifact_keeps_format_stop_ids_and_tokens(folder_with, tmp_path, name):
    original = tokenizer_with(name)
    folder = folder_with(original, eos_token_id=original.eos_token_id)
    tokenizer = load_tokenizer(folder)
    chat = format_of(tokenizer)
    save_causal(load_causal(folder), tmp_path / "artifact", tokenizer)
    again = format_of(load_tokenizer(tmp_path / "artifact"))
    dialogue = [Message("system", "kind"), user("hi"), assistant("yo")]
    assert again.encode(dialogue) == chat.encode(dialogue)
    assert again.stop_ids == chat.stop_ids
    ends = json.loads((tmp_path / "artifact/generation_config.json").read_text())["eos_token_id"]
    assert (ends if isinstance(ends, list) else [ends]) == chat.stop_ids
    plain = AutoTokenizer.from_pretrained(tmp_path / "artifact")
    said = [message._asdict() for message in dialogue[:2]]
    assert plain.apply_chat_template(said, add_generation_prompt=True, return_dict=False) == chat.encode_prompt(
        dialogue[:2]
    )


def test_plain_transformers_talks_with_an_artifact_and_stops_where_we_do(folder_with, tmp_path):
    """The model says one token alone, which only the template knows as an end."""
    tokenizer = tokenizer_with("llama3")
    folder = folder_with(tokenizer)
    model: Any = load_causal(folder)
    end = ids(tokenizer, "<|eot_id|>")[0]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_("embed" in name or "norm" in name)  # every hidden state is a vector of ones
        model.lm_head.weight[end] = 1
    save_causal(model, tmp_path / "artifact", load_tokenizer(folder))
    plain, said = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact"), [{"role": "user", "content": "hi"}]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "artifact")
    prompt = tokens.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")
    assert plain.generate(**prompt, max_new_tokens=4)[0, prompt["input_ids"].shape[1] :].tolist() == [end]  # type: ignore[attr-defined]
    talk: Any = pipeline("text-generation", model=plain, tokenizer=tokens)
    assert talk(said, max_new_tokens=4)[0]["generated_text"] == [*said, {"role": "assistant", "content": ""}]


def test_the_run_says_what_auto_chose(folder_with):
    own = folder_with(tokenizer_with("chatml"))
    assert "the template that the tokenizer of" in (notice(run(own)) or "")
    assert "llama2 replaces the template" in (notice(run(own, "llama2")) or "")
    assert notice(run(own, "tokenizer")) is None
    load_tokenizer(own, "llama2").save_pretrained(own)
    assert notice(run(own)) is None and notice(run(own, "llama2")) is None


def test_messages_are_checked_by_the_runs_format(folder_with):
    own = folder_with(tokenizer_with("mistral"))
    tagged, instructed = [user("[INST] hi")], [Message("system", "kind"), user("hi")]
    with pytest.raises(UserError, match="refuses messages of the roles system"):
        message_check(run(own))(instructed)
    message_check(run(own, "llama2"))(instructed)
    with pytest.raises(UserError, match="a tag of the chat format"):
        message_check(run(own, "llama2"))(tagged)


@pytest.mark.parametrize("name", ["endless", "forgetful"])
def test_a_template_that_cannot_be_masked_is_no_format_of_a_run(folder_with, name):
    folder = folder_with(tokenizer_with(name))
    with pytest.raises(UserError, match="model.chat_format: tokenizer does not work with the tokenizer of") as error:
        message_check(run(folder))
    assert "set model.chat_format to llama2" in error.value.message
    message_check(run(folder, "llama2"))


def test_tiny_brings_no_template():
    with pytest.raises(UserError, match="`tiny` is made without a chat template"):
        message_check(run("tiny", "tokenizer"))


def test_an_artifact_of_another_format_than_the_setting_is_refused(folder_with, tmp_path):
    own = folder_with(tokenizer_with("chatml"))
    load_tokenizer(own, "llama2").save_pretrained(tmp_path / "sft")
    (tmp_path / "sft/config.json").write_text((own / "config.json").read_text())
    inputs = {"sft": tmp_path / "sft"}
    check_inputs(run(own), inputs)
    check_inputs(run(own, "llama2"), inputs)
    with pytest.raises(UserError, match="is tokenizer, but sft was trained in another .* run sft again") as error:
        check_inputs(run(own, "tokenizer"), inputs)
    assert error.value.exit_code == 4
