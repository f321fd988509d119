"""Loads, checks and saves causal models in the formats of transformers and PEFT."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as sharding
from transformers.utils import logging as logs

from rlhf.chat import format_of
from rlhf.distributed.sequence import SequenceGroup
from rlhf.errors import UserError
from rlhf.kernels.attention import has_windows
from rlhf.kernels.norm import tune_norms
from rlhf.models import lora
from rlhf.models.folders import LOAD_ERRORS, adapter_base, find_model, has_tokenizer, is_adapter, why
from rlhf.models.packing import pack
from rlhf.models.saving import State, first_rank, save_weights
from rlhf.models.slices import SLICES, States, group_of_model, read_slice, use_slices
from rlhf.models.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration with every dropout at 0 (the first PPO ratio must be exactly 1) and its tokenizer's
    pad.

    The embedding of the pad token gets no gradient; with pad = EOS the model would never learn EOS.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot read {folder / 'config.json'}: {why(error)}", 4) from error
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if isinstance(value, float) and "drop" in key:
                setattr(part, key, 0.0)
        if hasattr(part, "output_router_logits"):
            part.output_router_logits = False  # no stage has a router loss
    if has_tokenizer(folder):
        text = config.get_text_config()
        pad = load_tokenizer(folder).pad_token_id
        text.pad_token_id = pad if pad < text.vocab_size else None
    return config


def load_causal(path: str | Path, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM without dropout, from a full checkpoint or from a PEFT adapter (merged into its base).

    UserError (4) if the folder cannot be read or lacks weights; none is initialised at random.
    """
    folder = find_model(path)
    if is_adapter(folder):
        return merge_adapter(load_causal, folder, dtype, attention)
    model = load_complete(AutoModelForCausalLM, folder, dtype, attention)
    make_savable(model)
    _make_room_for_pad(model, folder)
    return model


def make_savable(model: PreTrainedModel) -> None:
    """Drops generation settings that transformers would refuse to save, except token ids; PPO and chat have their own.

    Llama 2 and Vicuna, for example, have a temperature but no do_sample.
    """
    given = model.generation_config
    try:
        given.validate(strict=True)
    except ValueError as error:
        log.info("generation settings of the model are left out: %s", str(error).splitlines()[0])
        ids = {key: value for key, value in given.to_diff_dict().items() if key.endswith("_token_id")}
        model.generation_config = type(given)(**ids)


def load_complete(
    auto_class: Any, folder: Path, dtype: torch.dtype, attention: str, labels: int | None = None, **settings: Any
) -> Any:
    """`auto_class.from_pretrained`, with UserError (4) for missing weights, which it would initialise at random.

    `labels`: rows of a classifier's head, which config.json may not say.
    """
    config = load_config(folder)
    if labels is not None:
        config.num_labels = labels
    families = auto_class._model_mapping
    if attention == "sdpa" and type(config) in families and not families[type(config)]._supports_sdpa:
        attention = "eager"  # a run has refused this before; other readers of models have no such setting
    try:
        with quiet():
            model, report = auto_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                trust_remote_code=False,
                **settings,
            )
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load a model from {folder}: {why(error)}", 4) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"the checkpoint in {folder} lacks weights: {missing[0]} ({len(missing)} in all)", 4)
    tune_norms(model)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and its report of unused and missing weights, which are raised as errors."""
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def _make_room_for_pad(model: PreTrainedModel, folder: Path) -> None:
    """Adds an embedding row if the tokenizer needed a new token for padding."""
    if model.config.get_text_config().pad_token_id is not None or not has_tokenizer(folder):
        return
    tokenizer = load_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # all ranks must add the same row
        model.resize_token_embeddings(len(tokenizer))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def merge_adapter(load_base: Any, folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """The adapter's base with the adapter merged in. Loaded whole on each rank, because shards cannot be merged."""
    with _unsharded():
        base = load_base(adapter_base(folder), dtype=dtype, attention=attention)
        try:
            return PeftModel.from_pretrained(base, folder).merge_and_unload().requires_grad_(True)  # PEFT froze it
        except LOAD_ERRORS as error:
            raise UserError(f"cannot apply the adapter in {folder}: {error}", 4) from error


@contextlib.contextmanager
def _unsharded() -> Iterator[None]:
    """Switches off ZeRO-3 loading, which may be on in the caller."""
    active = sharding._hf_deepspeed_config_weak_ref
    sharding.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        sharding._hf_deepspeed_config_weak_ref = active


def read_weight(folder: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint from the disk, found by the end of its name."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  no mapping
                if key.endswith(name):
                    return weights.get_tensor(key)
    for file in sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")]):
        for key, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
            if key.endswith(name):
                return tensor
    return None


def save_causal(model: nn.Module, folder: str | Path, tokenizer: Any, *, all_ranks: bool = False) -> None:
    """Saves an ordinary AutoModelForCausalLM folder with safetensors.

    `all_ranks`: all ranks call it, and each writes some of the files of `model`, which may be sharded. Otherwise this
    process writes alone. A model with LoRA is saved merged, so that any library loads it, and the adapter alone in
    `adapter/`.
    """
    folder, causal = Path(folder), without_adapter_wrapper(model)
    for settings in (causal.config.get_text_config(), causal.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
    if ends := format_of(tokenizer).stop_ids:
        causal.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]

    def finish(state: State) -> State:
        return lora.merged(model, state) if isinstance(model, PeftModel) else state

    with quiet():
        adapter = save_weights(model, causal, folder, finish, all_ranks=all_ranks)

    def rest() -> None:
        if isinstance(model, PeftModel):
            lora.save_adapter(model, folder / "adapter", adapter)
        tokenizer.save_pretrained(folder)

    first_rank(rest, folder, all_ranks)


def without_adapter_wrapper(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel (its layers still apply the adapter), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def recompute_activations(module: nn.Module) -> None:
    """Switches gradient checkpointing on: layers keep only their inputs and run again in the backward pass."""
    model = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    model.gradient_checkpointing_enable()
    module.train()  # layers do so in training mode only; there is no dropout that it could switch on


def hidden_states(
    model: nn.Module, tokens_BT: Tensor, mask_BT: Tensor, packing: bool = False, response_length: int = 0
) -> Tensor:
    """hidden_BTH before the LM head, 0 at padding; otherwise as `read_states`."""
    states = read_states(model, tokens_BT, mask_BT, packing, response_length)
    here_BT = states.place_BT >= 0
    hidden_BTH = states.hidden_MH.new_zeros(*mask_BT.shape, states.hidden_MH.shape[-1])
    hidden_BTH[here_BT] = states.hidden_MH.index_select(0, states.place_BT[here_BT])
    return states.everywhere(hidden_BTH)


def read_states(
    model: nn.Module, tokens_BT: Tensor, mask_BT: Tensor, packing: bool = False, response_length: int = 0
) -> States:
    """The states of the real tokens. Positions count real tokens, so padding on either side has no effect.

    Rows are shifted to start with their first real token. No causal token sees the padding after them, so attention
    needs no mask and can use its fastest kernel.

    `packing`: the model reads the real tokens of all rows as one row of N tokens, and each prompt (the columns before
    the last `response_length`) once. If no prompt occurs twice, restarting positions tell transformers where a row
    ends, and `_row_ends` tells flash attention; otherwise a mask is used.
    """
    mask_BT = mask_BT.bool()
    length_B = mask_BT.sum(1)
    position_BT = mask_BT.long().cumsum(1) - mask_BT.long()
    whole = without_adapter_wrapper(model)
    read, group = partial(whole.base_model, use_cache=False), group_of_model(whole)
    if packing:
        packed = pack(tokens_BT, mask_BT, response_length, share=can_share_prompts(model))
        rows = {"input_ids": tokens_BT[packed.read_BT][None], "position_ids": position_BT[packed.read_BT][None]}
        place_BT = packed.place_BT.masked_fill(~mask_BT, -1)
        if group is None:
            sees = _row_ends(model, mask_BT) if packed.sees_NN is None else _mask_for(model, packed.sees_NN[None, None])
            return States(read(**rows, **sees).last_hidden_state[0], place_BT, None)
        ends = _ends(length_B) if packed.sees_NN is None else None
        hidden_MH, in_slice = read_slice(read, rows["input_ids"], rows["position_ids"], group, ends, packed.sees_NN)
        return States(hidden_MH, in_slice(place_BT), group)
    W = int(length_B.max())
    real_BW = torch.arange(W, device=mask_BT.device) < length_B[:, None]
    tokens_BW = tokens_BT.new_zeros(real_BW.shape)
    tokens_BW[real_BW] = tokens_BT[mask_BT]
    place_BT = torch.arange(len(mask_BT), device=mask_BT.device)[:, None] * W + position_BT
    place_BT = place_BT.masked_fill(~mask_BT, -1)
    if group is None:
        return States(read(input_ids=tokens_BW).last_hidden_state.flatten(0, 1), place_BT, None)
    column_BW = torch.arange(W, device=mask_BT.device).expand(real_BW.shape)
    hidden_MH, in_slice = read_slice(read, tokens_BW, column_BW, group)
    return States(hidden_MH, in_slice(place_BT), group)


def read_batch(model: nn.Module, shape: tuple[int, ...], **inputs: Any) -> States:
    """The states of `inputs` as transformers names them, of B rows and T columns: padded on the right, or packed to one."""
    whole = without_adapter_wrapper(model)
    tokens_BT, group = inputs["input_ids"], group_of_model(whole)
    place_BT = torch.arange(math.prod(shape), device=tokens_BT.device).view(shape)
    if group is None:
        if not follows_row_ends(model):
            inputs = {
                name: value for name, value in inputs.items() if not name.startswith(("cu_seq_lens", "max_length"))
            }
        return States(whole.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1), place_BT, None)
    position_BT = inputs.get("position_ids", torch.arange(shape[1], device=tokens_BT.device).expand(shape))
    read, ends = partial(whole.base_model, use_cache=False), inputs.get("cu_seq_lens_q")
    hidden_MH, in_slice = read_slice(read, tokens_BT, position_BT, group, ends)
    return States(hidden_MH, in_slice(place_BT), group)


def divide_sequences(model: nn.Module, group: SequenceGroup | None) -> None:
    """From now on each rank of the group reads a slice of every sequence. None changes nothing."""
    if group is not None:
        use_slices(without_adapter_wrapper(model), group)


def can_share_prompts(model: nn.Module) -> bool:
    """Whether the model's attention can use our mask: not in flash attention, and not with attention windows."""
    config = without_adapter_wrapper(model).config.get_text_config()
    return config._attn_implementation in ("sdpa", "eager", SLICES) and not has_windows(config)


def follows_row_ends(model: nn.Module) -> bool:
    """Whether a packed row's mask only says where rows end. In other families it may say more and must be read."""
    return without_adapter_wrapper(model)._supports_flash_attn


def _row_ends(model: nn.Module, mask_BT: Tensor) -> dict[str, Any]:
    """The ends of packed rows under transformers' names; empty for families that do not use them."""
    if not follows_row_ends(model):
        return {}
    length_B = mask_BT.sum(1)
    longest, ends = int(length_B.max()), _ends(length_B)
    of_keys = {"cu_seq_lens_k": ends, "max_length_k": longest}
    return {"cu_seq_lens_q": ends, "max_length_q": longest, "seq_idx": mask_BT.nonzero()[None, :, 0].int()} | of_keys


def _ends(length_B: Tensor) -> Tensor:
    """Row i of packed rows is `ends[i]` to `ends[i + 1]`, int32."""
    return nn.functional.pad(length_B.cumsum(0), (1, 0)).to(torch.int32)


def _mask_for(model: nn.Module, sees_11NN: Tensor) -> dict[str, Tensor]:
    """The mask in the form of the model's attention: bool for sdpa, added to the scores for eager."""
    whole = without_adapter_wrapper(model)
    if whole.config.get_text_config()._attn_implementation == "sdpa":
        return {"attention_mask": sees_11NN}
    unseen_11NN = torch.zeros(sees_11NN.shape, dtype=whole.dtype, device=sees_11NN.device)
    return {"attention_mask": unseen_11NN.masked_fill_(~sees_11NN, torch.finfo(whole.dtype).min)}


@torch.no_grad()
def check_packing(model: nn.Module, setting: str, sharing: bool = False) -> None:
    """UserError (4) for families whose attention ignores where a packed row ends or, with `sharing`, the mask by which
    rows share a prompt. `setting` names the setting to change."""
    device = next(model.parameters()).device
    tokens_BT = torch.tensor([[3, 4, 5], [6, 7, 8]], device=device)
    if sharing:
        tokens_BT[1, :2] = tokens_BT[0, :2]
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    padded, packed = (hidden_states(model, tokens_BT, mask_BT, packing, 1).float() for packing in (False, True))
    if (packed - padded).norm() > 0.05 * padded.norm():  # bf16 stays within 0.01
        raise UserError(f"packed rows see one another in models of this family; set {setting} to false", 4)
    if sharing and not can_share_prompts(model):
        raise UserError(
            f"packed responses cannot share their prompt in models whose attention has a window; set {setting} to false",
            4,
        )


@torch.no_grad()
def check_slices(model: nn.Module) -> None:
    """UserError (4) for families whose attention cannot be divided over ranks. All ranks must call it."""
    base: Any = next(part for part in model.modules() if isinstance(part, PreTrainedModel)).base_model
    if (group := group_of_model(base)) is None:
        return
    device = next(model.parameters()).device
    tokens_BT = torch.arange(3, 3 + 2 * group.ranks + 1, device=device)[None]  # no multiple of the ranks
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    divided = hidden_states(base, tokens_BT, mask_BT).float()
    base.sequence_group = None
    whole = hidden_states(base, tokens_BT, mask_BT).float()
    base.sequence_group = group
    if not (divided - whole).norm() <= 0.05 * whole.norm():  # bf16 stays within 0.01
        raise UserError("attention in models of this family cannot be divided; set hardware.sequence_parallel to 1", 4)


def lm_head(model: nn.Module) -> nn.Module:
    """The output projection. UserError (4) for families that change the logits afterwards."""
    whole = without_adapter_wrapper(model)
    config = whole.config.get_text_config()
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise UserError(
                f"{config.model_type} models change their logits after the LM head ({key}), which PPO here does not "
                "reproduce; use a Llama-like model",
                4,
            )
    head = whole.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(f"the LM head of {config.model_type} models has a bias, which SFT and PPO do not read", 4)
    return head
