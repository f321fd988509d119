"""Models: find, make, load and save. What is saved here loads in plain transformers and PEFT.

pretrained.py  folders ↔ causal models                     scalar.py  reward and value model
folders.py     where a model is                            tokenizer.py  EOS ids, pad, chat template
lora.py        adapters                                    tiny.py    a small Llama made on the spot
gguf.py        GGUF files → ordinary folders              attention.py  causal attention in bf16
packing.py     rows one behind the other                  norm.py    norms of a Llama's layers in bf16
requirements.py  what a run asks of a model
weights.py     a folder's weights one at a time           encoder.py  classifiers that only score
"""

from pathlib import Path

from rlhf.config import RunConfig
from rlhf.distributed import collectives
from rlhf.models.encoder import Encoder, load_encoder
from rlhf.models.folders import find_model
from rlhf.models.gguf import import_gguf
from rlhf.models.lora import add_lora
from rlhf.models.pretrained import (
    check_packing,
    follows_row_ends,
    hidden_states,
    lm_head,
    load_causal,
    load_config,
    recompute_activations,
    save_causal,
)
from rlhf.models.requirements import check_model, positions
from rlhf.models.scalar import ScalarModel, last_value, load_scalar, new_critic
from rlhf.models.tiny import make_tiny
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.weights import weights_that_fit

__all__ = [
    "Encoder",
    "ScalarModel",
    "add_lora",
    "check_model",
    "check_packing",
    "find_model",
    "follows_row_ends",
    "hidden_states",
    "import_gguf",
    "last_value",
    "lm_head",
    "load_causal",
    "load_config",
    "load_encoder",
    "load_scalar",
    "load_tokenizer",
    "make_tiny",
    "new_critic",
    "positions",
    "recompute_activations",
    "resolve",
    "save_causal",
    "weights_that_fit",
]


def resolve(config: RunConfig) -> Path:
    """The folder of the run's base model; `tiny` is made once in the run's folder, by the first rank. UserError (4) where
    there is none. All ranks must call it."""
    if config.model.path == "tiny":
        return collectives.broadcast_result(lambda: make_tiny(config))
    return find_model(config.model.path)  # where it lies in a node's own cache of the hub is for the node to say
