import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from rlhf.config import LoraConfig
from rlhf.errors import UserError
from rlhf.models import add_lora, load_causal, load_scalar, save_causal
from rlhf.models.lora import merged

SETTINGS = LoraConfig(rank=4, alpha=8)


def trained(model: nn.Module) -> nn.Module:
    """B starts at zero, so an untrained adapter would prove nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def causal(causal_folder):
    return trained(add_lora(load_causal(causal_folder), SETTINGS, "causal", seed=0))


@pytest.fixture
def scalar_with_lora(scalar):
    return trained(add_lora(scalar, SETTINGS, "scalar", seed=0))


def test_only_the_adapter_of_a_causal_model_learns(causal):
    learning = {name for name, parameter in causal.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(".lora_" in name for name in learning)


def test_adapter_and_head_of_a_scalar_model_learn(scalar_with_lora, right_padded):
    scalar_with_lora.score(*right_padded).sum().backward()
    learning = {name for name, parameter in scalar_with_lora.named_parameters() if parameter.grad is not None}
    assert "head.weight" in learning
    assert all(".lora_" in name for name in learning - {"head.weight"})


def test_saved_causal_model_is_whole_and_its_adapter_stands_beside_it(causal, causal_folder, tmp_path, tokenizer):
    tokens = torch.tensor([[5, 6, 7]])
    save_causal(causal, tmp_path, tokenizer)
    expected = causal(tokens).logits
    untrained = AutoModelForCausalLM.from_pretrained(causal_folder)(tokens).logits
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(tokens).logits
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_peft, expected, atol=1e-4, rtol=1e-4)
    assert (expected - untrained).abs().max() > 1e-2


def test_adapter_folder_loads_merged(causal, tmp_path, tokenizer):
    tokens = torch.tensor([[5, 6, 7]])
    save_causal(causal, tmp_path, tokenizer)
    again = load_causal(tmp_path / "adapter")
    assert not isinstance(again, peft.PeftModel)
    torch.testing.assert_close(again(tokens).logits, causal(tokens).logits, atol=1e-4, rtol=1e-4)


def test_adapter_of_a_causal_model_gives_its_trunk_to_a_scalar_model(causal, tmp_path, tokenizer, right_padded):
    save_causal(causal, tmp_path, tokenizer)
    model = load_scalar(tmp_path / "adapter")
    assert not model.score(*right_padded).any()
    again = load_causal(tmp_path)
    backbone, whole = model.backbone.state_dict(), again.base_model.state_dict()
    assert backbone.keys() == whole.keys()
    assert all(torch.equal(backbone[name], whole[name]) for name in whole)


def test_saved_scalar_model_is_whole_and_its_adapter_stands_beside_it(
    scalar_with_lora, right_padded, tmp_path, tokenizer
):
    tokens, mask = right_padded
    scalar_with_lora.save(tmp_path, tokenizer)
    expected = scalar_with_lora.score(tokens, mask)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    adapter = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    adapter.config.pad_token_id = tokenizer.pad_token_id
    for model in (whole, adapter.eval()):
        scores = model(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(load_scalar(tmp_path).score(tokens, mask), expected, atol=1e-4, rtol=1e-4)


def test_weights_that_lie_transposed_are_merged_too():
    """GPT-2 keeps its matrices as [in, out]."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0)).eval()
    model = trained(add_lora(base, SETTINGS, "causal", seed=0))
    tokens = torch.tensor([[1, 2, 3]])
    plain = GPT2LMHeadModel(base.config).eval()
    plain.load_state_dict(merged(model, dict(model.state_dict())))
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_seed_alone_decides_how_adapters_start(causal_folder):
    def start(seed, caller_seed):
        torch.manual_seed(caller_seed)
        model = add_lora(load_causal(causal_folder), SETTINGS, "causal", seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(start(1, caller_seed=5), start(1, caller_seed=6))
    assert not torch.equal(start(1, caller_seed=5), start(2, caller_seed=5))


def test_targets_that_the_model_lacks_are_refused(causal_folder):
    with pytest.raises(UserError, match="model.lora") as error:
        add_lora(load_causal(causal_folder), LoraConfig(targets=["no_such_layer"]), "causal", seed=0)
    assert error.value.exit_code == 2


def test_adapters_are_merged_in_float32_into_a_base_that_is_kept_in_bf16(causal):
    """In bf16 an update of a thousandth of its weight would vanish."""
    exact = merged(causal, dict(causal.state_dict()))
    for name, parameter in causal.named_parameters():
        if ".base_layer." in name:
            parameter.data = parameter.data.bfloat16()
    kept = merged(causal, dict(causal.state_dict()))
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    name = next(name for name in kept if name.endswith("q_proj.weight"))
    update = exact[name] - next(t for n, t in causal.state_dict().items() if "q_proj.base_layer" in n).float()
    assert not torch.equal(kept[name], kept[name].bfloat16().float()) and update.any()
