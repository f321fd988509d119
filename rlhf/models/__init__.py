"""Models: find, make, load and save. Saved folders load in plain transformers and PEFT.

pretrained.py    causal models from and to folders   scalar.py     reward and value model
folders.py       where a model is                    tokenizer.py  EOS ids, pad token, chat template
lora.py          adapters                            policy.py     logprobs of response tokens
tiny.py          a new small Llama                   gguf.py       GGUF files to ordinary folders
packing.py       concatenated rows                   weights.py    weights of a folder, one at a time
requirements.py  what a run requires of a model      encoder.py    encoder classifiers, which only score
slices.py        sequences divided over ranks
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
    check_slices,
    divide_sequences,
    follows_row_ends,
    hidden_states,
    lm_head,
    load_causal,
    load_config,
    read_batch,
    read_states,
    recompute_activations,
    save_causal,
)
from rlhf.models.requirements import check_model, positions
from rlhf.models.scalar import ScalarModel, last_value, load_reward_scalar, load_scalar, new_critic
from rlhf.models.tiny import make_tiny
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.weights import weights_that_fit

__all__ = [
    "Encoder",
    "ScalarModel",
    "add_lora",
    "check_model",
    "check_packing",
    "check_slices",
    "divide_sequences",
    "find_model",
    "follows_row_ends",
    "hidden_states",
    "import_gguf",
    "last_value",
    "lm_head",
    "load_causal",
    "load_config",
    "load_encoder",
    "load_reward_scalar",
    "load_scalar",
    "load_tokenizer",
    "make_tiny",
    "new_critic",
    "positions",
    "read_batch",
    "read_states",
    "recompute_activations",
    "resolve",
    "save_causal",
    "weights_that_fit",
]


def resolve(config: RunConfig) -> Path:
    """The folder of the run's base model; the first rank makes `tiny` once, in the run's folder. UserError (4) if there
    is none. All ranks must call it."""
    if config.model.path == "tiny":
        return collectives.broadcast_result(lambda: make_tiny(config))
    return find_model(config.model.path)  # each node has its own hub cache
