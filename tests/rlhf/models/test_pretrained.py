import json
import shutil
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from rlhf.data import pad
from rlhf.errors import UserError
from rlhf.models import (
    check_packing,
    find_model,
    hidden_states,
    lm_head,
    load_causal,
    load_config,
    load_tokenizer,
    recompute_activations,
    save_causal,
)


def word_tokenizer(words, **special):
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def gpt2(folder, tokenizer, **settings):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32, **settings)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "<pad>"}, "<pad>"),
        ({"pad_token": "</s>"}, "<unk>"),
        ({}, "<unk>"),
        ({"pad_token": "</s>", "extra_special_tokens": ["<reserved_0>", "<|pad|>"]}, "<|pad|>"),
    ],
)
def test_pad_is_a_spare_token_and_never_eos(tmp_path, special, pad):
    words = ["<unk>", "<s>", "</s>", "<pad>", "<reserved_0>", "<|pad|>", "hi"]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special
    gpt2(tmp_path, word_tokenizer(words, **special))
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token == pad
    assert len(loaded) == len(words)


@pytest.fixture
def without_spare_token(tmp_path):
    """Like GPT-2: one special token does everything."""
    end = {"unk_token": "<end>", "bos_token": "<end>", "eos_token": "<end>"}
    return gpt2(tmp_path, word_tokenizer(["<end>", "hi", "yo"], **end))


def test_pad_is_added_where_no_token_is_spare(without_spare_token):
    tokenizer = load_tokenizer(without_spare_token)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 3)


def test_model_grows_with_an_added_pad_and_says_the_same(without_spare_token):
    tokens = torch.tensor([[0, 1, 2, 1]])
    plain = AutoModelForCausalLM.from_pretrained(without_spare_token).eval()(tokens).logits
    grown = load_causal(without_spare_token)
    assert grown.config.pad_token_id == 3
    torch.testing.assert_close(grown(tokens).logits[..., :3], plain)
    again = load_causal(without_spare_token)
    torch.testing.assert_close(again.get_input_embeddings().weight, grown.get_input_embeddings().weight)


def test_tokenizer_without_eos_is_refused(tmp_path):
    gpt2(tmp_path, word_tokenizer(["<unk>", "hi"], unk_token="<unk>"))
    with pytest.raises(UserError, match="no EOS") as error:
        load_tokenizer(tmp_path)
    assert error.value.exit_code == 4


def test_dropout_is_off_even_in_training_mode(tmp_path):
    words = ["<unk>", "</s>", "hi"]
    folder = gpt2(tmp_path, word_tokenizer(words, unk_token="<unk>", eos_token="</s>"), resid_pdrop=0.5, attn_pdrop=0.5)
    model = load_causal(folder).train()
    tokens = torch.tensor([[1, 2, 2]])
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_eos_embedding_learns_though_the_checkpoint_says_pad_is_eos(causal_folder, tmp_path):
    folder = shutil.copytree(causal_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    eos = config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": eos}))
    model = load_causal(folder)
    model(torch.tensor([[5, eos, 6]])).logits.sum().backward()
    gradient = next(p.grad for name, p in model.named_parameters() if name == "model.embed_tokens.weight")
    assert gradient is not None
    assert gradient[eos].abs().sum() > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_no_layout_of_rows_changes_their_hidden_states(causal_folder, sequences, tokenizer, left, packing, attention):
    """Each row alone, without padding and by plain transformers, is the oracle."""
    model = load_causal(causal_folder, attention=attention)
    plain = AutoModelForCausalLM.from_pretrained(causal_folder)
    tokens, mask = pad(sequences, tokenizer.pad_token_id, left=left)
    hidden = hidden_states(model, tokens, mask, packing)
    for row, sequence in enumerate(sequences):
        expected = plain.model(torch.tensor([sequence])).last_hidden_state[0]
        torch.testing.assert_close(hidden[row][mask[row]], expected, atol=1e-5, rtol=0)


def test_packed_rows_do_not_see_one_another(causal_folder, tokenizer):
    """Equal rows, so that a leak could not hide in their positions; the gradient of one reaches no token of another."""
    model: Any = load_causal(causal_folder)
    tokens, mask = pad([[5, 6, 7], [8, 9, 10], [11], [12]], tokenizer.pad_token_id)
    hidden_states(model, tokens, mask, packing=True)[1].sum().backward()
    reached = model.get_input_embeddings().weight.grad.abs().sum(1).nonzero()[:, 0]
    assert reached.tolist() == [8, 9, 10]


def test_a_family_whose_packed_rows_see_one_another_is_refused(causal_folder, monkeypatch):
    model: Any = load_causal(causal_folder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    check_packing(model, "ppo.packing")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda position_ids=None, **rest: forward(**rest))
    with pytest.raises(UserError, match=r"ppo\.packing"):
        check_packing(model, "ppo.packing")


@pytest.mark.parametrize("packing", [False, True])
def test_recomputed_activations_give_the_same_gradient(causal_folder, sequences, tokenizer, packing):
    tokens, mask = pad(sequences, tokenizer.pad_token_id)
    gradients, calls = [], []
    for module in (load_causal(causal_folder), load_causal(causal_folder)):
        if gradients:
            recompute_activations(module)
        module.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        hidden_states(module, tokens, mask, packing)[mask].pow(2).sum().backward()
        gradients.append([p.grad for p in module.model.parameters()])
    assert len(calls) == 3  # once, and then twice
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=0, rtol=0)


def test_lm_head_on_hidden_states_gives_the_logits(causal_folder):
    model = load_causal(causal_folder)
    tokens = torch.tensor([[5, 6, 7]])
    hidden = hidden_states(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(lm_head(model)(hidden), model(tokens).logits)


def test_families_that_change_their_logits_are_refused():
    config = Gemma2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
        num_key_value_heads=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="final_logit_softcapping"):
        lm_head(Gemma2ForCausalLM(config))


def test_saved_model_is_an_ordinary_folder(causal_folder, tmp_path, tokenizer):
    model = load_causal(causal_folder)
    save_causal(model, tmp_path, tokenizer)
    tokens = torch.tensor([[5, 6, 7]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits)
    assert plain.generation_config.pad_token_id == tokenizer.pad_token_id
    turn = [{"role": "user", "content": "hi"}]
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(turn, tokenize=False) == "<s>[INST] hi [/INST]"


def test_missing_weights_are_never_made_up(causal_folder, tmp_path):
    folder = shutil.copytree(causal_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj.*1 in all") as error:
        load_causal(folder)
    assert error.value.exit_code == 4


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_torn_files_are_one_message(causal_folder, tmp_path, file):
    folder = shutil.copytree(causal_folder, tmp_path / "model")
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(UserError) as error:
        load_causal(folder)
    assert error.value.exit_code == 4
    assert str(folder) in error.value.message


def test_what_is_no_model_is_named_with_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.gguf").touch()
    for name, said in {
        "absent": "there is no model folder",
        "empty": "holds no config.json, but nothing",
        "weights.gguf": "import-gguf",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            find_model(tmp_path / name)
        assert error.value.exit_code == 4
        assert str(tmp_path / name) in error.value.message


def test_generation_settings_that_cannot_be_saved_leave_their_ids(causal_folder, tmp_path):
    folder = shutil.copytree(causal_folder, tmp_path / "model")
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 0], "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    save_causal(load_causal(folder), tmp_path / "saved", load_tokenizer(folder))
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["bos_token_id"], "temperature" in saved) == ([2, 0], 1, False)


def _adapter(causal_folder, folder):
    base = AutoModelForCausalLM.from_pretrained(causal_folder)
    peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(
        folder
    )
    return folder


def test_a_merged_adapter_learns_whole_and_reads_by_its_bases_tokenizer(causal_folder, tmp_path, tokenizer):
    folder = _adapter(causal_folder, tmp_path / "adapter")
    assert all(p.requires_grad for p in load_causal(folder).parameters())
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()


def test_an_adapter_whose_base_is_gone_names_its_file(causal_folder, tmp_path):
    folder = _adapter(causal_folder, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace(str(causal_folder), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"adapter_config\.json names its base.*no model folder") as error:
        load_causal(folder)
    assert error.value.exit_code == 4


def test_router_logits_are_not_asked_for(tmp_path):
    MixtralConfig(output_router_logits=True).save_pretrained(tmp_path)
    assert load_config(tmp_path).output_router_logits is False


CODE = """
from pathlib import Path
Path(MARKER).touch()
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
"""


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_causal])
def test_code_that_a_model_brings_is_never_run(tmp_path, load):
    folder = tmp_path / "own"
    folder.mkdir()
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "code.OwnConfig", "AutoTokenizer": ["code.OwnTokenizer", None]},
    }
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(own))
    (folder / "code.py").write_text(CODE.replace("MARKER", repr(str(tmp_path / "ran"))))
    with pytest.raises(UserError, match="brings Python code of its own, which is never run") as caught:
        load(folder)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "ran").exists()
