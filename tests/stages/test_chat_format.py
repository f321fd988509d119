"""A base model with a chat template of its own keeps it through SFT, a reward model and PPO."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import chat
from rlhf.chat import format_of
from rlhf.config import TinyConfig
from rlhf.errors import UserError
from rlhf.models import load_tokenizer, save_causal
from rlhf.models.tiny import untrained_llama
from tests.rlhf.chat.templates import LLAMA3, tokenizer_with

pytestmark = pytest.mark.integration

STAGES = ("sft", "reward/helpfulness", "ppo")
LENGTHS = ("--sft.max_length", "512", "--reward.max_length", "512", "--ppo.max_prompt_length", "384")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("base") / "model", tokenizer_with("llama3")
    shape = TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2)
    save_causal(untrained_llama(shape, tokenizer, seed=0), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def config(settings, make_stage, base):
    config = settings("--model.path", str(base), "--ppo.safety_model", "helpfulness", *LENGTHS)
    for stage in STAGES:
        make_stage(config, stage)
    return config


def test_every_artifact_keeps_template_and_ends(config):
    for stage in (*STAGES, "ppo/artifact/critic"):
        folder = config.folder / stage / ("" if "artifact" in stage else "artifact")
        assert load_tokenizer(folder).chat_template == LLAMA3
    tokenizer = load_tokenizer(config.folder / "ppo/artifact")
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    for stage in ("sft", "ppo"):
        written = json.loads((config.folder / stage / "artifact/generation_config.json").read_text())
        assert written["eos_token_id"] == ends
    assert format_of(tokenizer).stop_ids == ends


def test_responses_end_by_the_token_that_the_template_teaches(config, metrics):
    """SFT has seen no other end: the tokenizer's EOS stands in no dialogue."""
    report = metrics(config.folder / "ppo/artifact")["held_out"]
    assert report["base"]["eos_rate"]["value"] < report["sft"]["eos_rate"]["value"]


def test_rlhf_chat_says_what_plain_transformers_says(config, capsys):
    folder = config.folder / "ppo/artifact"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is 1 plus 3, in digits?"}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        tokens_BT = model.generate(**prompt, max_new_tokens=12, do_sample=False)  # type: ignore[attr-defined]
    said = tokenizer.decode(tokens_BT[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    chat.chat(str(config.folder / "ppo"), 0.0, 12, io.StringIO("what is 1 plus 3, in digits?\n"))
    assert capsys.readouterr().out.split() == said.split() != []


def test_a_stage_refuses_an_artifact_of_another_format(config, beside, make_stage, base):
    other = beside(
        config,
        "--model.path",
        str(base),
        "--ppo.safety_model",
        "helpfulness",
        "--model.chat_format",
        "llama2",
        *LENGTHS,
    )
    with pytest.raises(UserError, match="is llama2, but sft was trained in another chat format"):
        make_stage(other, "ppo")
