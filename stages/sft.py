"""Stage 1, supervised fine-tuning on TRL: chat encoding, loss on responses only, packing, held-out loss.

Llama 2, §3.1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer
from trl.data_utils import pack_dataset

from rlhf.config import RunConfig, SFTConfig
from rlhf.data import encode_demonstrations
from rlhf.distributed import collectives
from rlhf.distributed.engine import end_sharded_loading, sharded_loading
from rlhf.distributed.means import Means
from rlhf.distributed.sequence import group_of
from rlhf.kernels.logprobs import logprobs_from_hidden
from rlhf.models import (
    add_lora,
    check_model,
    check_packing,
    divide_sequences,
    lm_head,
    load_causal,
    load_tokenizer,
    read_batch,
    resolve,
    save_causal,
)
from rlhf.runs import provenance
from rlhf.runs.artifacts import Artifact
from rlhf.runs.context import StageContext
from stages.trl_trainer import OwnTraining, Reporter, fit, for_groups, in_training_order, silence, trainer_arguments

log = logging.getLogger(__name__)

IGNORED = -100  # transformers' label of tokens without loss


class Trainer(OwnTraining, SFTTrainer):
    """TRL's trainer with our loss; its own is made for GPU kernels and spends most of a CPU's step on the LM head."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = 1
    ) -> Tensor:
        """-Σ log p of this micro-batch over the number of response tokens of all ranks and micro-batches."""
        # DeepSpeed averages gradients over ranks; the count is global already, so the average becomes a sum again.
        return -model(**inputs).sum() * self.accelerator.num_processes / num_items_in_batch


class PackingCheck(TrainerCallback):
    """Checks before the first step, when the model is sharded and readable, that packed rows stay separate, here and in
    PPO, which would find out two stages later."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.config.sft.packing:
            check_packing(model, "sft.packing")
        if "ppo" in self.config.pipeline and self.config.ppo.packing:
            check_packing(model, "ppo.packing", self.config.ppo.group_size > 1)


def main(config: RunConfig, context: StageContext) -> Artifact:
    """Fine-tunes the base model on demonstrations; the artifact is an ordinary causal model folder."""
    silence()
    base = resolve(config)
    tokenizer = load_tokenizer(base, config.model.chat_format)
    roles = provenance.stage_data(config, context.roles)
    data = roles["demonstrations"]
    train = _labelled(encode_demonstrations(tokenizer, data.train, config.sft.max_length))
    held_out = _labelled(encode_demonstrations(tokenizer, data.held_out, config.sft.max_length))

    packed = pack(train, config.sft)
    lengths = [len(tokens) for tokens in packed["input_ids"]]
    rows = in_training_order(packed, lengths, config.sft, context.stage, config.seed)
    steps = len(rows) // config.sft.batch_size
    rows = for_groups(rows, config.sft, context)
    arguments = trainer_arguments(config, config.sft, context, steps)
    with sharded_loading(config.hardware, context.local):
        model = load_causal(base, attention=config.model.attention)
    check_model(config, model.config)
    causal = model
    divide_sequences(model, group_of(context.sequence_parallel))
    if config.model.lora is not None:
        model = add_lora(model, config.model.lora, "causal", config.seed)
    trainer = Trainer(
        model=model,
        args=TRLConfig(
            **arguments,
            max_length=None,
            padding_free=config.sft.packing,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.optim = config.sft.optim
    trainer.add_callback(PackingCheck(config))
    if hasattr(causal.config.get_text_config(), "output_router_logits"):
        causal.config.get_text_config().output_router_logits = False  # TRL turned it on for its own loss
    causal.forward = partial(response_logprobs, causal)  # replaces TRL's, inside any wrapper of the model

    def measure() -> float:
        return held_out_loss(model, held_out, config, context, tokenizer.pad_token_id)

    names = {"loss": "sft/loss", "grad_norm": "sft/grad_norm", "learning_rate": "sft/lr"}
    fit(trainer, Reporter(context, names, "sft/loss", config.sft.evals, lambda: {"sft/held_out_loss": measure()}))

    metrics = {"held_out_loss": measure(), "steps": steps, "sequences": len(train)}
    return _commit(config, context, model, tokenizer, provenance.parents(roles, context.inputs), metrics)


def pack(rows: Sequence[dict[str, list[int]]], settings: SFTConfig) -> Dataset:
    """Sequences packed to `max_length` with their lengths, so that none sees another; unchanged without packing, and
    where packing would leave less than one batch."""
    dataset = Dataset.from_list(list(rows))
    if not settings.packing:
        return dataset
    packed = pack_dataset(dataset, settings.max_length, strategy="bfd")
    if len(packed) < settings.batch_size <= len(dataset):
        log.warning(
            "sft: packing %d rows leaves %d, less than one batch (sft.batch_size %d): they are not packed",
            *(len(dataset), len(packed), settings.batch_size),
        )
        return dataset
    return packed


def response_logprobs(causal: nn.Module, labels: Tensor, **inputs: Any) -> Tensor:
    """logprobs_N, float32: the forward pass of a causal model for its response tokens, those with a label.

    For packed rows TRL passes their positions and their ends. Other rows are padded on the right.
    """
    states = read_batch(causal, labels.shape, **inputs)
    labels_BT = labels[:, 1:]
    response_BT = labels_BT != IGNORED
    weight_VH = cast(Tensor, lm_head(causal).weight)

    def read(hidden_NH: Tensor, here_BT: Tensor) -> tuple[Tensor]:
        return (logprobs_from_hidden(hidden_NH[None], weight_VH, labels_BT[here_BT][None])[0],)

    return states.values(states.place_BT[:, :-1].masked_fill(~response_BT, -1), read)[0][response_BT]


@torch.no_grad()
def held_out_loss(
    model: nn.Module, rows: Sequence[dict[str, list[int]]], config: RunConfig, context: StageContext, pad_id: int
) -> float:
    """-log p per response token in nats, over all held-out response tokens of all ranks."""
    was_training = model.training
    model.eval()
    means = Means()
    mine = [rows[i] for i in collectives.even_shard(len(rows), context.sequence_parallel)]
    for start in range(0, len(mine), config.sft.micro_batch_size):
        part = mine[start : start + config.sft.micro_batch_size]
        tokens_BT = _padded([r["input_ids"] for r in part], pad_id).to(context.device)
        labels_BT = _padded([r["labels"] for r in part], IGNORED).to(context.device)
        mask_BT = _padded([[1] * len(r["input_ids"]) for r in part], 0).to(context.device)
        with torch.autocast(context.device.type, torch.bfloat16, enabled=config.hardware.precision == "bf16"):
            logprobs_N = model(input_ids=tokens_BT, attention_mask=mask_BT, labels=labels_BT)
        means.add("loss", -logprobs_N.sum(), torch.tensor(len(logprobs_N)))
    model.train(was_training)
    return means.reduce()["loss"]


def _commit(
    config: RunConfig,
    context: StageContext,
    model: nn.Module,
    tokenizer: Any,
    parents: dict[str, str],
    metrics: dict[str, Any],
) -> Artifact:
    end_sharded_loading()
    return provenance.commit(
        config, context, parents, metrics, weights=lambda folder: save_causal(model, folder, tokenizer, all_ranks=True)
    )


def _labelled(rows: Sequence[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": row["input_ids"],
            "labels": [
                token if is_response else IGNORED
                for token, is_response in zip(row["input_ids"], row["assistant_masks"], strict=True)
            ],
        }
        for row in rows
    ]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
