"""ScalarModel: a causal backbone with a float32 head over every position, used as reward model and as value model.

A reward is read at the last real token, a value at the position before each response token (Llama 2, §3.2.2).
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from rlhf.errors import UserError
from rlhf.models import lora
from rlhf.models.folders import adapter_base, find_model, is_adapter
from rlhf.models.pretrained import (
    load_causal,
    load_complete,
    load_config,
    merge_adapter,
    quiet,
    read_states,
    read_weight,
)
from rlhf.models.saving import HEAD, State, first_rank, save_weights


class Float32Head(nn.Module):
    """hidden_BTH → values_BT in float32, even inside autocast: bf16 would keep three digits of a score.

    Not an nn.Linear, because DeepSpeed's autocast would gather its weight in bf16.
    """

    def __init__(self, weight_1H: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_1H.detach().float().clone())

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            return F.linear(hidden_BTH.float(), self.weight.float()).squeeze(-1)


class ScalarModel(nn.Module):
    def __init__(self, backbone: nn.Module, head_1H: Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Float32Head(head_1H)
        self.offset = offset
        """Mean score of SFT responses, subtracted by `score`; 0 until the model is centred."""
        self.packing = False
        """Concatenates rows instead of padding them, and reads each prompt once; the values are the same."""

    @property
    def config(self) -> PretrainedConfig:
        return self.backbone.config  # type: ignore[return-value]

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor, response_length: int = 0) -> Tensor:
        """values_BT, float32, without the offset. Padding may be on either side.

        With `response_length`, the columns of the responses, packed rows share equal prompts.
        """
        states = read_states(self.backbone, tokens_BT, mask_BT, self.packing, response_length)
        return states.values(states.place_BT, lambda hidden_NH, _: (self.head(hidden_NH),))[0]

    def score(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """scores_B, float32: the value at the last real token minus the offset."""
        return last_value(self(tokens_BT, mask_BT), mask_BT) - self.offset

    def save(self, folder: str | Path, tokenizer: Any, *, all_ranks: bool = False) -> None:
        """Saves an ordinary AutoModelForSequenceClassification folder with one label and safetensors.

        `all_ranks` as in `save_causal`. The offset is `reward_offset` in config.json; other readers ignore it. A
        backbone with LoRA is saved merged, and the adapter with the head in `adapter/`.
        """
        folder = Path(folder)
        classifier = _empty_classifier(self.config, tokenizer.pad_token_id, self.offset)
        finish = partial(self._as_classifier, classifier.base_model_prefix)
        with quiet():
            aside = save_weights(self, classifier, folder, finish, all_ranks=all_ranks)

        def rest() -> None:
            if isinstance(self.backbone, lora.PeftModel):
                head_1H, adapter = aside.pop(HEAD), {_in_backbone(name): tensor for name, tensor in aside.items()}
                lora.save_adapter(self.backbone, folder / "adapter", adapter, head_1H)
            tokenizer.save_pretrained(folder)

        first_rank(rest, folder, all_ranks)

    def _as_classifier(self, prefix: str, state: State) -> State:
        """Some of this module's weights under the names of transformers' classifier, with adapters merged."""
        head = {"score.weight": state[HEAD]} if HEAD in state else {}
        backbone = {_in_backbone(name): tensor for name, tensor in state.items() if name != HEAD}
        if isinstance(self.backbone, lora.PeftModel):
            backbone = lora.merged(self.backbone, backbone)
        return {f"{prefix}.{name}": tensor for name, tensor in backbone.items()} | head


def _in_backbone(name: str) -> str:
    return name.removeprefix("backbone.")


def new_critic(reward_model: ScalarModel) -> ScalarModel:
    """The reward model as a critic with a zero head, so that all its values start at 0.

    Returns are centred, whitened and include the KL, so they are on another scale than scores: a critic that starts
    with scores is worse than none. The backbone already knows good responses (initialising from the reward model:
    Ouyang et al. 2022, arXiv 2203.02155, appendix C.4).
    """
    torch.nn.init.zeros_(reward_model.head.weight)
    reward_model.offset = 0.0
    return reward_model


def last_value(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """values_B at the last real token of each row, with padding on either side."""
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (positions_T * mask_BT.long()).argmax(1)
    return values_BT.gather(1, last_B[:, None])[:, 0]


def load_scalar(path: str | Path, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> ScalarModel:
    """A ScalarModel from a folder saved by it, any one-label sequence classifier, a causal LM (with a zero head), or a
    PEFT adapter of either.

    UserError (4) if the folder cannot be read, or is a classifier without a head: a random head would make the scores
    noise.
    """
    folder = find_model(path)
    if is_adapter(folder):
        return _from_adapter(folder, dtype, attention)
    config = load_config(folder)
    _classifier_class(config)  # before hours of training
    if not _is_classifier(config):
        causal = load_causal(folder, dtype=dtype, attention=attention)
        return ScalarModel(causal.base_model, torch.zeros(1, config.get_text_config().hidden_size))
    head_1H = _read_head(folder)
    classifier = load_complete(AutoModelForSequenceClassification, folder, dtype, attention, labels=1)
    return ScalarModel(classifier.base_model, head_1H, getattr(config, "reward_offset", 0.0))


def load_reward_scalar(folder: Path) -> ScalarModel:
    """A ScalarModel that scores. UserError (4) for a model without a trained head, a causal LM for instance."""
    scalar = load_scalar(folder)
    if not scalar.head.weight.any():
        raise UserError(f"{folder} is no reward model: it has no trained score head", 4)
    return scalar.eval()


def _is_classifier(config: PretrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _read_head(folder: Path) -> Tensor:
    """head_1H from the file, so that loading the backbone in bf16 does not round it."""
    head = read_weight(folder, "score.weight")
    if head is None:
        raise UserError(f"{folder} says that it is a reward model, and has no score.weight", 4)
    if head.shape[0] != 1:
        raise UserError(f"the classifier in {folder} has {head.shape[0]} labels; a reward model has one", 4)
    return head


def _from_adapter(folder: Path, dtype: torch.dtype, attention: str) -> ScalarModel:
    task = json.loads((folder / "adapter_config.json").read_text()).get("task_type")
    if task != "SEQ_CLS":
        backbone: Any = load_causal(folder, dtype=dtype, attention=attention).base_model
        return ScalarModel(backbone, torch.zeros(1, backbone.config.get_text_config().hidden_size))
    base = adapter_base(folder)
    trained_head = read_weight(folder, "score.weight") is not None
    head_1H = _read_head(folder if trained_head else base)
    classifier = merge_adapter(_load_classifier, folder, dtype, attention)
    return ScalarModel(classifier.base_model, head_1H)


def _load_classifier(path: Path, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The base model of a classifier's adapter; the head may be the adapter's."""
    model = load_scalar(path, dtype=dtype, attention=attention)
    classifier = _empty_classifier(model.config, None, 0.0)
    setattr(classifier, classifier.base_model_prefix, model.backbone)
    classifier.score = nn.Linear(model.head.weight.shape[1], 1, bias=False)
    classifier.score.weight = model.head.weight
    return classifier


def _empty_classifier(config: PretrainedConfig, pad_token_id: int | None, offset: float) -> PreTrainedModel:
    """The classifier of this family without memory for weights, which knows how to save its folder."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = pad_token_id
    config.reward_offset = float(offset)
    with torch.device("meta"):
        return _classifier_class(config)(config)


def _classifier_class(config: PretrainedConfig) -> Any:
    try:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    except KeyError as error:
        raise UserError(
            f"transformers has no sequence classifier for {config.model_type}, so no reward model", 4
        ) from error
