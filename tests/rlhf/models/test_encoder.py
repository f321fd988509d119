from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from launch import cli
from rlhf.errors import UserError
from rlhf.models import load_encoder

SHAPE = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16}


def encoder(folder: Path, family: str, labels: int = 1, **settings: Any) -> Path:
    """A classifier that transformers made and saved without our code, with the special tokens of BERT."""
    config = AutoConfig.for_model(family, num_labels=labels, pad_token_id=1, **SHAPE, **settings)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "INST", "yes", "no", "why"]
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "settings"), [("deberta-v2", DEBERTA), ("roberta", {}), ("bert", {})])
def test_rlhf_score_scores_as_the_encoder_itself_does(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    """Padded beside a longer row; the oracle reads one row alone, its format written out."""
    folder, rows, out = encoder(tmp_path / "model", family, **settings), tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"prompt": "why", "completion": "yes"}\n{"prompt": "why why why", "completion": "no no"}\n')
    assert cli.main(["score", str(folder), str(rows), "--out", str(out)]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = AutoTokenizer.from_pretrained(folder)("[CLS] [INST] why [/INST] yes [SEP]", add_special_tokens=False)
    expected = model(torch.tensor([text["input_ids"]])).logits.item()
    assert float(out.read_text().split('"score": ')[1].split("}")[0]) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_with_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 labels; a reward model has one") as error:
        load_encoder(encoder(tmp_path, "roberta", labels=2))
    assert error.value.exit_code == 4


def test_causal_families_are_left_to_the_other_loader(causal_folder: Path) -> None:
    assert load_encoder(causal_folder) is None
