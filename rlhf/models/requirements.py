"""What a run requires of a model, checked from its configuration: before the first stage, and when a stage opens it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
)

from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.kernels.attention import has_windows
from rlhf.models.encoder import is_encoder

BAD_SETTING, UNFIT_MODEL = 2, 4
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
STRETCHED = ("linear", "dynamic", "yarn")  # rope types that extend the positions by `factor`
PADDED_POSITIONS = ("roberta", "camembert", "longformer", "mpnet", "ibert", "data2vec-text")  # counted from pad + 1
LOGIT_KEYS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
HEAD_BIASES = ("phi", "gptj", "codegen", "ctrl", "modernbert-decoder")  # families whose LM head adds a bias


def positions(config: PretrainedConfig) -> int | None:
    """The number of positions of a model; None without a limit."""
    text: Any = config.get_text_config()
    if _has_alibi(text) and text.model_type != "mpt":  # MPT has a table of biases
        return None
    limit = next((value for key in POSITION_KEYS if (value := getattr(text, key, None))), None)
    if limit is None or limit < 0:
        return None
    if any(family in text.model_type for family in PADDED_POSITIONS):
        return limit - (text.pad_token_id or 0) - 1
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in STRETCHED:
        return max(limit, int((rope.get("original_max_position_embeddings") or limit) * (rope.get("factor") or 1.0)))
    return limit


def check_model(run: RunConfig, model: PretrainedConfig) -> None:
    """UserError with everything that does not fit the run; its exit code is that of the first."""
    if found := list(misfits(run, model)):
        raise UserError("\n".join(text for text, _ in found), found[0][1])


def misfits(run: RunConfig, model: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """(what is wrong and what to do, exit code)"""
    yield from _lengths(run, model)
    yield from _family(model)
    yield from _attention(run, model)
    yield from _packing(run, model)
    yield from _slices(run, model)


def _lengths(run: RunConfig, model: PretrainedConfig) -> Iterator[tuple[str, int]]:
    limit = positions(model)
    lengths = {f"{name}.max_length": getattr(getattr(run, name, None), "max_length", 0) for name in run.pipeline}
    if "ppo" in run.pipeline:
        prompt, response = run.ppo.max_prompt_length, run.ppo.sampling.max_new_tokens
        lengths[f"ppo.max_prompt_length ({prompt}) + ppo.sampling.max_new_tokens ({response})"] = prompt + response
    for key, length in lengths.items():
        if limit is not None and length > limit:
            yield (
                f"{key}: {length} tokens, and the model has {limit} positions; lower it to {limit} or less",
                BAD_SETTING,
            )


def _family(model: PretrainedConfig) -> Iterator[tuple[str, int]]:
    kind, text = model.model_type, model.get_text_config()
    remedy = "use a model of another family, such as Llama, Mistral, Qwen2 or GPT-2"
    if model.is_encoder_decoder or is_encoder(model) or type(model) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield f"model.path: {kind} is no causal language model, which SFT and PPO train; {remedy}", UNFIT_MODEL
        return
    if type(model) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        text_ = f"transformers has no sequence classifier for {kind}, so no reward model could be saved"
        yield f"model.path: {text_}; {remedy}", UNFIT_MODEL
    for key in LOGIT_KEYS:
        if getattr(text, key, None) not in (None, 1, 1.0):
            text_ = f"{kind} models change their logits after the LM head ({key}), which SFT and PPO do not reproduce"
            yield f"model.path: {text_}; {remedy}", UNFIT_MODEL
    if kind in HEAD_BIASES:
        text_ = f"the LM head of {kind} models has a bias, which SFT and PPO do not read"
        yield f"model.path: {text_}; {remedy}", UNFIT_MODEL


def _attention(run: RunConfig, model: PretrainedConfig) -> Iterator[tuple[str, int]]:
    asked, flag = run.model.attention, {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    if asked == "eager" or type(model) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    if not getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(model)], flag[asked], False):
        yield f"model.attention: {model.model_type} models have no {asked}; set model.attention to eager", BAD_SETTING


def _packing(run: RunConfig, model: PretrainedConfig) -> Iterator[tuple[str, int]]:
    text = model.get_text_config()
    packed = [name for name in run.pipeline if getattr(getattr(run, name, None), "packing", False)]
    if _has_alibi(text):
        for key in packed:
            reason = f"attention of {text.model_type} models goes by distance and does not see where a packed row ends"
            yield f"{key}.packing: {reason}; set {key}.packing to false", BAD_SETTING
    if "ppo" in packed and run.ppo.group_size > 1 and has_windows(text):
        reason = "packed responses cannot share their prompt in models whose attention has a window"
        yield f"ppo.packing: {reason}; set ppo.packing to false, or ppo.group_size to 1", BAD_SETTING


def _slices(run: RunConfig, model: PretrainedConfig) -> Iterator[tuple[str, int]]:
    together, text = run.hardware.sequence_parallel, model.get_text_config()
    if together == 1:
        return
    key, heads = "hardware.sequence_parallel", text.num_attention_heads
    if heads % together:
        yield (
            f"{key}: {together} workers cannot share {heads} attention heads equally; set it to a divisor",
            BAD_SETTING,
        )
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model), None)
    if has_windows(text) or _has_alibi(text) or not getattr(family, "_supports_attention_backend", False):
        reason = f"attention of {text.model_type} models with windows, or outside of transformers' interface"
        yield f"{key}: {reason}, cannot be divided; set {key} to 1", BAD_SETTING


def _has_alibi(text: Any) -> bool:
    return text.model_type in ("bloom", "mpt") or bool(getattr(text, "alibi", False))
