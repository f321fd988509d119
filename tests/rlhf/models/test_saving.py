"""Models are written file by file: the same folder as in one piece, and never a whole copy in memory."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from rlhf.config import LoraConfig
from rlhf.models import add_lora, load_causal, save_causal, saving
from tests.rlhf.planning.measured import LiveBytes

WIDTHS: Any = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 280}


@pytest.fixture
def deep():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, num_key_value_heads=2, **WIDTHS))


def weights_in(folder):
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("limit", [1, 50_000, 10**9])
def test_files_hold_what_one_file_of_transformers_holds(deep, tokenizer, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(saving, "FILE_BYTES", limit)
    save_causal(deep, tmp_path / "ours", tokenizer)
    deep.save_pretrained(tmp_path / "theirs")
    assert_equal(weights_in(tmp_path / "ours"), weights_in(tmp_path / "theirs"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal(dict(again.named_parameters()), dict(deep.named_parameters()))


def test_the_index_is_that_of_transformers(deep, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "FILE_BYTES", 50_000)
    save_causal(deep, tmp_path / "ours", tokenizer)
    deep.save_pretrained(tmp_path / "theirs", max_shard_size=50_000)
    ours, theirs = (json.loads((tmp_path / name / saving.INDEX).read_text()) for name in ("ours", "theirs"))
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    for name, file in ours["weight_map"].items():
        assert name in load_file(tmp_path / "ours" / file)
    assert {file.name for file in (tmp_path / "ours").glob("*.safetensors")} == set(ours["weight_map"].values())


def test_tied_weights_are_written_once(tokenizer, tmp_path):
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **WIDTHS))
    save_causal(tied, tmp_path, tokenizer)
    assert "lm_head.weight" not in weights_in(tmp_path)
    assert_equal(dict(load_causal(tmp_path).named_parameters()), dict(tied.named_parameters()))


def test_experts_have_their_names_of_the_hub(tokenizer, tmp_path, monkeypatch):
    """transformers joins them while it loads, and divides them while it saves."""
    torch.manual_seed(0)
    experts = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, num_local_experts=3, **WIDTHS))
    experts.save_pretrained(tmp_path / "theirs")
    monkeypatch.setattr(saving, "FILE_BYTES", 1)
    save_causal(experts, tmp_path / "ours", tokenizer)
    assert_equal(weights_in(tmp_path / "ours"), weights_in(tmp_path / "theirs"))


def test_adapters_are_merged_file_by_file(deep, tokenizer, tmp_path, monkeypatch):
    adapted = add_lora(deep, LoraConfig(rank=2, alpha=4, targets=["q_proj", "lm_head"]), "causal", seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    monkeypatch.setattr(saving, "FILE_BYTES", 1)
    save_causal(adapted, tmp_path, tokenizer)
    expected = adapted.merge_and_unload()
    found = load_causal(tmp_path)
    torch.testing.assert_close(found(torch.tensor([[5, 6]])).logits, expected(torch.tensor([[5, 6]])).logits)
    assert len(load_file(tmp_path / "adapter/adapter_model.safetensors")) == 2 * 13


def test_no_more_than_three_files_are_in_memory(deep, tokenizer, tmp_path, monkeypatch):
    """One that fills, one that waits for the disk, one that is written, beside the model itself."""
    size = sum(p.nbytes for p in deep.model.layers[0].parameters())  # more than the tables
    monkeypatch.setattr(saving, "FILE_BYTES", size)
    with LiveBytes() as live:
        save_causal(deep, tmp_path, tokenizer)
    own = sum(p.nbytes for p in deep.parameters())
    assert size <= live.peak - own <= 3 * size
    assert own > 10 * size


def test_a_file_holds_what_passed_and_not_what_came_after(tmp_path):
    weight = torch.ones(2)

    def passing():
        yield "a", weight
        weight.zero_()  # as a bucket does when it is let go
        yield "b", weight

    saving.write_files(tmp_path, passing(), {"x.safetensors": ["a", "b"]}, lambda state: state)
    assert_equal(load_file(tmp_path / "x.safetensors"), {"a": torch.ones(2), "b": torch.zeros(2)})


def test_what_went_wrong_is_told_after_all_weights_have_passed(deep, tokenizer, tmp_path, monkeypatch):
    passed, whole = [], saving.whole_weights
    monkeypatch.setattr(saving, "FILE_BYTES", 1)
    monkeypatch.setattr(saving, "whole_weights", lambda m: (passed.append(n) or (n, x) for n, x in whole(m)))

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(RuntimeError, match="rank 0 failed while saving a model to .*No space left"):
        save_causal(deep, tmp_path, tokenizer)
    assert passed == [name for name, _ in deep.named_parameters()]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 100)), min_size=1), st.integers(1, 200))
def test_files_are_whole_layers_and_as_full_as_the_limit_allows(weights, limit):
    sizes = {f"model.layers.{layer}.part{n}.weight": size for n, (layer, size) in enumerate(weights)}
    files = saving.planned_files(sizes, limit)
    assert sorted(name for file in files for name in file) == sorted(sizes)
    layers = [{name.split(".")[2] for name in file} for file in files]
    assert sum(map(len, layers)) == len({layer for layer, _ in weights})
    total = [sum(sizes[name] for name in file) for file in files]
    assert all(size <= limit or len(own) == 1 for size, own in zip(total, layers, strict=True))
    first = [sum(sizes[n] for n in file if n.split(".")[2] == file[0].split(".")[2]) for file in files]
    assert all(a + b > limit for a, b in zip(total, first[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts.7.up_proj.weight", "model.layers.3"),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight", "base_model.model.model.layers.3"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.base_layer.weight", "lm_head"),
        ("lm_head.lora_B.default.weight", "lm_head"),
    ],
)
def test_the_layer_of_a_weight(name, layer):
    assert saving.layer_of(name) == layer
