"""The sizes of a Llama-like model, from its config.json or, for Llama 2, from a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import LoraConfig, ModelConfig

TABLE = {  # Touvron et al. 2023 (arXiv 2307.09288) and the config.json of the published weights
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 8),
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
"""Families whose layers are those of Llama: four matrices of attention, three of a gated MLP."""
NEEDED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    vocab: int
    hidden: int
    inner: int  # of the MLP
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 0  # 0: hidden / heads
    tied: bool = False

    @property
    def query(self) -> int:
        return self.heads * (self.head_size or self.hidden // self.heads)

    @property
    def kv(self) -> int:
        return self.kv_heads * (self.head_size or self.hidden // self.heads)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of a layer, as (outputs, inputs)."""
        attention = {
            "q_proj": (self.query, self.hidden),
            "k_proj": (self.kv, self.hidden),
            "v_proj": (self.kv, self.hidden),
        }
        mlp = {"gate_proj": (self.inner, self.hidden), "up_proj": (self.inner, self.hidden)}
        return attention | {"o_proj": (self.hidden, self.query)} | mlp | {"down_proj": (self.hidden, self.inner)}

    @property
    def table(self) -> int:
        return self.vocab * self.hidden

    @property
    def backbone_products(self) -> int:
        """Weights of the layers' matrix products."""
        return self.layers * sum(out * into for out, into in self.matrices.values())

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """Of the causal model."""
        return self.backbone_products + self.norms + self.table * (1 if self.tied else 2)

    @property
    def largest(self) -> int:
        """Of one weight."""
        return max(self.table, *(out * into for out, into in self.matrices.values()))

    @property
    def cached_numbers(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv

    def adapter(self, lora: LoraConfig) -> int:
        """Weights of a LoRA adapter on these targets."""
        names = ADAPTED if lora.targets == "all-linear" else lora.targets
        names = [names] if isinstance(names, str) else names
        sides = [sum(self.matrices[name]) for name in names if name in self.matrices]
        return self.layers * lora.rank * sum(sides)


def shape_of(model: ModelConfig) -> ModelShape | None:
    """None for a model that is neither on this disk nor in the table, or whose family has other layers."""
    if model.path == "tiny":
        tiny = model.tiny
        return ModelShape(
            tiny.vocab_size, tiny.hidden_size, tiny.intermediate_size, tiny.layers, tiny.heads, tiny.heads
        )
    try:
        return from_config(json.loads((Path(model.path).expanduser() / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        found = re.search(r"llama-2-(?:7|13|70)b", model.path.lower())
        return ModelShape(*TABLE[found[0]]) if found else None


def parameters_of(model: ModelConfig, weight_bytes: int = 0) -> int:
    """0 for a model of which nothing is known. `weight_bytes`: the size of its weights if they are not in its folder."""
    if (shape := shape_of(model)) is not None:
        return shape.parameters
    folder = Path(model.path).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))  # some folders hold both forms
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    size = sum(file.stat().st_size for file in files) or weight_bytes
    return size // (2 if dtype in ("float16", "bfloat16") else 4)


def from_config(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape that a config.json describes; None for other layers than Llama's."""
    if config.get("model_type") not in GATED or not config.keys() >= NEEDED:
        return None
    heads = config["num_attention_heads"]
    return ModelShape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or 0,
        tied=bool(config.get("tie_word_embeddings", False)),
    )
