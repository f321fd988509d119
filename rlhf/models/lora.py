"""LoRA with PEFT (Hu et al. 2021): adds adapters, and extracts merged or adapter weights from a state dict.

It uses state dicts, because under ZeRO-3 modules only hold shards.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.config import LoraConfig
from rlhf.errors import UserError

PREFIX = "base_model.model."
ADAPTER = "default"


def add_lora(model: Any, settings: LoraConfig, task: Literal["causal", "scalar"], seed: int) -> Any:
    """A causal LM as PeftModel, or a ScalarModel with an adapter on its backbone and a trainable head.

    `seed` initialises the adapters, equally on all ranks. UserError (2) for targets that the model does not have.
    """
    if task == "scalar":
        model.backbone = _wrap(model.backbone, settings, "FEATURE_EXTRACTION", seed)
        return model
    return _wrap(model, settings, "CAUSAL_LM", seed)


def _wrap(model: Any, settings: LoraConfig, task_type: str, seed: int) -> PeftModel:
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets, task_type=task_type
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora: {error}") from error


def merged(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + scaling · B·A for each adapted weight, under the names of the model without adapters; all in float32.

    `state`: weights of whole layers of `model`, not necessarily of all.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and f"{name}.base_layer.weight" in state
    }
    whole = {
        name.replace(".base_layer.", ".").replace(PREFIX, "", 1): tensor.float()
        for name, tensor in state.items()
        if ".lora_" not in name
    }
    for name, layer in layers.items():
        a_RI, b_OR = (state[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        update = (b_OR @ a_RI) * layer.scaling[ADAPTER]
        weight = state[f"{name}.base_layer.weight"]
        update = update.T if getattr(layer, "fan_in_fan_out", False) else update
        target = f"{name}.weight".replace(PREFIX, "", 1)
        whole[target] = weight.float() + update  # float32: in bf16 a small update would vanish
    return whole


def save_adapter(model: PeftModel, folder: Path, state: dict[str, Tensor], head: Tensor | None = None) -> None:
    """Saves a PEFT adapter folder; with a score head_1H one for AutoModelForSequenceClassification."""
    config: Any = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    weights = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in state.items() if ".lora_" in name}
    if head is not None:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = ["score"]
        inner = f"{PREFIX}{model.get_base_model().base_model_prefix}."  # the backbone's place in the classifier
        weights = {name.replace(PREFIX, inner, 1): tensor for name, tensor in weights.items()}
        weights[f"{PREFIX}score.weight"] = head
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
