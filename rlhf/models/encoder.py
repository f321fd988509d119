"""Encoder classifiers such as DeBERTa, which score responses; no stage trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForSequenceClassification, PretrainedConfig

from rlhf.errors import UserError
from rlhf.models.folders import is_adapter
from rlhf.models.pretrained import load_complete, load_config, read_weight

HEADS = ("classifier.out_proj.weight", "classifier.weight")  # RoBERTa and similar; BERT and DeBERTa


class Encoder(nn.Module):
    """Uses the model's own forward pass, because its head may pool or have layers."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    @property
    def config(self) -> PretrainedConfig:
        return self.classifier.config

    def score(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """scores_B, float32. Padding is on the right."""
        return self.classifier(input_ids=tokens_BT, attention_mask=mask_BT.long()).logits[:, 0].float()


def load_encoder(folder: Path) -> Encoder | None:
    """The one-label classifier in `folder`; None if it is not an encoder. UserError (4) for other numbers of labels."""
    if is_adapter(folder) or not is_encoder(load_config(folder)):
        return None
    head = next((weight for name in HEADS if (weight := read_weight(folder, name)) is not None), None)
    if head is not None and len(head) != 1:
        raise UserError(f"the classifier in {folder} has {len(head)} labels; a reward model has one", 4)
    return Encoder(load_complete(AutoModelForSequenceClassification, folder, torch.float32, "eager", labels=1))


def is_encoder(config: PretrainedConfig) -> bool:
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
