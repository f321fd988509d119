import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BloomConfig, GPT2Config

from rlhf.data import pad
from rlhf.errors import UserError
from rlhf.models import hidden_states, last_value, load_causal, load_scalar, new_critic


@pytest.fixture
def classifier_folder(causal_folder, tokenizer, tmp_path):
    """A one-label classifier that transformers made and saved without our code."""
    model = AutoModelForSequenceClassification.from_pretrained(causal_folder, num_labels=1)
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def plain_scores(folder, tokens, mask):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]


def edit_weights(folder, target, change):
    shutil.copytree(folder, target)
    file = next(target.glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return target


def test_padding_and_order_of_rows_change_no_score(scalar, sequences, tokenizer):
    one = torch.ones(1, dtype=torch.bool)
    alone = torch.cat([scalar.score(torch.tensor([s]), one.expand(1, len(s))) for s in sequences])
    for left in (False, True):
        for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
            tokens, mask = pad([sequences[i] for i in order], tokenizer.pad_token_id, left=left)
            torch.testing.assert_close(scalar.score(tokens, mask), alone[order], atol=1e-5, rtol=0)


def test_padding_in_the_middle_of_prompt_and_response_changes_no_value(scalar, sequences, tokenizer):
    """The layout of PPO: prompts padded on the left, responses on the right."""
    prompt, response = sequences[1], sequences[3]
    whole = torch.tensor([prompt + response])
    expected = scalar(whole, torch.ones_like(whole, dtype=torch.bool))[0]
    tokens, mask = torch.full((1, 16), tokenizer.pad_token_id), torch.zeros(1, 16, dtype=torch.bool)
    tokens[0, 2:13], mask[0, 2:13] = whole[0], True
    torch.testing.assert_close(scalar(tokens, mask)[0, 2:13], expected, atol=1e-5, rtol=0)


def test_last_value_stands_at_the_last_real_token():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0]]).bool()
    assert last_value(values, mask).tolist() == [2.0, 6.0, 7.0]


def test_saved_model_scores_the_same_in_plain_transformers_up_to_the_offset(scalar, right_padded, tokenizer, tmp_path):
    scalar.offset = 0.75
    scalar.save(tmp_path, tokenizer)
    torch.testing.assert_close(plain_scores(tmp_path, *right_padded) - 0.75, scalar.score(*right_padded))


def test_saved_model_comes_back_with_its_offset(scalar, right_padded, tokenizer, tmp_path):
    scalar.offset = 0.75
    scalar.save(tmp_path, tokenizer)
    again = load_scalar(tmp_path)
    assert again.offset == 0.75
    assert torch.equal(again.score(*right_padded), scalar.score(*right_padded))


def test_any_one_label_classifier_loads(classifier_folder, right_padded):
    scores = load_scalar(classifier_folder).score(*right_padded)
    torch.testing.assert_close(scores, plain_scores(classifier_folder, *right_padded))
    assert scores.abs().sum() > 0


def test_classifier_of_another_family_loads(tmp_path, tokenizer, right_padded):
    config = GPT2Config(vocab_size=280, n_embd=16, n_layer=1, n_head=2, pad_token_id=3)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.testing.assert_close(load_scalar(tmp_path).score(*right_padded), plain_scores(tmp_path, *right_padded))


def test_a_family_without_sdpa_is_read_where_no_attention_is_named(tmp_path, tokenizer, right_padded):
    config = BloomConfig(vocab_size=280, hidden_size=16, n_layer=1, n_head=2, pad_token_id=3)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "scores")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "speaks")
    tokenizer.save_pretrained(tmp_path / "scores")
    scores = load_scalar(tmp_path / "scores").score(*right_padded)
    torch.testing.assert_close(scores, plain_scores(tmp_path / "scores", *right_padded))
    assert load_causal(tmp_path / "speaks")(right_padded[0]).logits.shape[-1] == 280


def test_head_of_a_causal_model_starts_at_zero_on_its_trunk(causal_folder, right_padded):
    model = load_scalar(causal_folder)
    assert torch.equal(model(*right_padded), torch.zeros(right_padded[0].shape))
    plain = AutoModelForCausalLM.from_pretrained(causal_folder)
    backbone = model.backbone.state_dict()
    assert all(torch.equal(backbone[name], weight) for name, weight in plain.base_model.state_dict().items())


def test_reward_model_without_its_head_is_refused(classifier_folder, tmp_path):
    folder = edit_weights(classifier_folder, tmp_path / "headless", lambda weights: weights.pop("score.weight"))
    with pytest.raises(UserError, match=r"score\.weight") as error:
        load_scalar(folder)
    assert error.value.exit_code == 4


def test_classifier_with_several_labels_is_refused(causal_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(causal_folder, num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 3 labels"):
        load_scalar(tmp_path)


def test_head_stays_float32_in_bf16_autocast(scalar, right_padded):
    tokens, mask = right_padded
    with torch.autocast("cpu", torch.bfloat16):
        values = scalar(tokens, mask)
        hidden = hidden_states(scalar.backbone, tokens, mask)
        rounded = F.linear(hidden, scalar.head.weight).squeeze(-1)
    exact = hidden.double() @ scalar.head.weight[0].double()
    torch.testing.assert_close(values.double(), exact, atol=1e-5, rtol=1e-5)
    assert (rounded.double() - exact).abs().max() > 1e-3  # what a plain linear layer would have given


def test_head_is_not_rounded_when_the_trunk_is_read_in_bf16(scalar, tokenizer, tmp_path):
    scalar.save(tmp_path, tokenizer)
    again = load_scalar(tmp_path, dtype=torch.bfloat16)
    assert again.backbone.dtype == torch.bfloat16
    assert torch.equal(again.head.weight, scalar.head.weight)


@pytest.fixture
def classifier_adapter(causal_folder, tmp_path):
    """A classification adapter that PEFT made and saved, and its base, which has no head."""
    base = AutoModelForSequenceClassification.from_pretrained(causal_folder, num_labels=1)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


def test_classification_adapter_loads(classifier_adapter, right_padded):
    model, folder = classifier_adapter
    tokens, mask = right_padded
    expected = model(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(load_scalar(folder).score(tokens, mask), expected, atol=1e-4, rtol=1e-4)


def test_classification_adapter_without_any_head_is_refused(classifier_adapter, tmp_path):
    def drop(weights):
        del weights["base_model.model.score.weight"]

    folder = edit_weights(classifier_adapter[1], tmp_path / "headless", drop)
    with pytest.raises(UserError, match=r"score\.weight"):
        load_scalar(folder)


def test_head_of_one_row_needs_no_num_labels(classifier_folder, right_padded):
    expected = plain_scores(classifier_folder, *right_padded)
    file = classifier_folder / "config.json"
    config = json.loads(file.read_text())
    for key in ("num_labels", "id2label", "label2id"):
        config.pop(key, None)
    file.write_text(json.dumps(config))
    torch.testing.assert_close(load_scalar(classifier_folder).score(*right_padded), expected)


def test_a_new_critic_has_the_trunk_of_the_reward_model_and_no_value_yet(scalar, right_padded):
    scalar.offset = 3.0
    before = {name: tensor.clone() for name, tensor in scalar.backbone.state_dict().items()}
    critic = new_critic(scalar)
    assert not critic(*right_padded).any() and not critic.score(*right_padded).any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.backbone.state_dict().items())
    assert critic.head.weight.requires_grad
