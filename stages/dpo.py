"""Direct preference optimization on TRL: from preference pairs to a policy, without reward models and without sampling.

Policy and frozen reference start as the SFT model. Rafailov et al. 2023 (arXiv 2305.18290), equation 7:
loss = -log σ(β · [(log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected))])
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer

from reward_data import Preference, normalised_prompt
from rlhf.chat import ChatFormat, format_of
from rlhf.config import RunConfig
from rlhf.data import pad
from rlhf.distributed import collectives
from rlhf.distributed.engine import end_sharded_loading, frozen, sharded_loading
from rlhf.errors import UserError
from rlhf.evaluation.held_out import write as write_rows
from rlhf.evaluation.reward_report import pair_rows, reward_report, wins
from rlhf.models import add_lora, check_model, load_causal, load_tokenizer, save_causal
from rlhf.runs import provenance
from rlhf.runs.artifacts import Artifact
from rlhf.runs.context import StageContext
from stages.trl_trainer import OwnTraining, Reporter, fit, in_training_order, silence, trainer_arguments

IGNORED = -100  # transformers' label of tokens without a logprob


@dataclass(frozen=True)
class Pair:
    """A preference in tokens. The responses include the tokens that end a turn."""

    row: Preference
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Trainer(OwnTraining, DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows unchanged: TRL would render and tokenize texts, but these are tokens of our chat format."""
        return dataset


def main(config: RunConfig, context: StageContext) -> Artifact:
    """Trains the policy on preferences; the artifact is an ordinary causal model folder."""
    silence()
    dpo = config.dpo
    tokenizer = load_tokenizer(context.inputs["sft"].path)
    data = provenance.stage_data(config, context.roles)
    pairs = encode_pairs(tokenizer, data["preferences"].train, dpo.max_length)
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    lengths = [pair.length for pair in pairs]
    train = in_training_order(Dataset.from_list(rows), lengths, dpo, context.stage, config.seed)
    steps = len(train) // dpo.batch_size
    trainer = open_trainer(config, context, tokenizer, train, steps)
    held_out = HeldOut(encode_pairs(tokenizer, data["preferences"].held_out, dpo.max_length), trainer, config, context)

    def measure() -> dict[str, float]:
        report = held_out.report(*held_out.rewards())
        return {"dpo/held_out_accuracy": report["accuracy"]["value"], "dpo/held_out_loss": report["loss"]}

    names = {"loss": "dpo/loss", "rewards/accuracies": "dpo/accuracy", "rewards/margins": "dpo/margin"}
    names |= {"rewards/chosen": "dpo/reward_chosen", "rewards/rejected": "dpo/reward_rejected"}
    names |= {"logps/chosen": "dpo/logprob_chosen", "logps/rejected": "dpo/logprob_rejected"}
    names |= {"grad_norm": "dpo/grad_norm", "learning_rate": "dpo/lr"}
    fit(trainer, Reporter(context, names, "dpo/accuracy", dpo.evals, measure))

    rewards = held_out.rewards()
    metrics = held_out.report(*rewards) | {"steps": steps, "pairs": len(pairs), "beta": dpo.beta}
    model: Any = trainer.model
    end_sharded_loading()
    return provenance.commit(
        config,
        context,
        provenance.parents(data, context.inputs),
        metrics,
        weights=lambda folder: save_causal(model, folder, tokenizer, all_ranks=True),
        write=lambda folder: write_rows(folder, held_out.rows_by_pair(*rewards)),
    )


def encode_pairs(tokenizer: Any, rows: Sequence[Preference], max_length: int) -> list[Pair]:
    """The pairs that fit into `max_length` tokens. UserError (3) if none does."""
    chat = format_of(tokenizer)
    pairs = [_encode(chat, row) for row in rows]
    short = [pair for pair in pairs if pair.length <= max_length]
    if not short:
        raise UserError(f"all {len(rows)} preferences are over {max_length} tokens; raise dpo.max_length", 3)
    return short


def _encode(chat: ChatFormat, row: Preference) -> Pair:
    try:
        prompt = chat.encode_prompt(row.prompt)
        chosen, rejected = (chat.encode_response(row.prompt, text) for text in (row.chosen, row.rejected))
    except UserError as error:
        raise UserError(f"{row.source}: {error.message}", error.exit_code) from error
    return Pair(row, prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def open_trainer(config: RunConfig, context: StageContext, tokenizer: Any, train: Dataset, steps: int) -> Trainer:
    """Policy and reference, sharded if there are several ranks. With LoRA the reference is the policy without its
    adapter."""
    sft, lora = context.inputs["sft"].path, config.model.lora
    arguments = trainer_arguments(config, config.dpo, context, steps)
    reference = None
    with sharded_loading(config.hardware, context.local):
        model = load_causal(sft, attention=config.model.attention)
        if lora is None:
            reference = frozen(load_causal(sft, attention=config.model.attention), config.hardware)
    check_model(config, model.config)
    if lora is not None:
        model = add_lora(model, lora, "causal", config.seed)
    trainer = Trainer(
        model=model,
        ref_model=reference,  # type: ignore[arg-type]
        args=TRLConfig(**arguments, beta=config.dpo.beta, max_length=None, router_aux_loss_coef=0.0),
        train_dataset=train,
        processing_class=tokenizer,
    )
    trainer.optim = config.dpo.optim
    if lora is not None:  # TRL's copy of the new adapter, which does nothing yet, so the model without it is the same
        model.delete_adapter("ref")
    return trainer


class HeldOut:
    """Held-out pairs, and how the policy's implicit rewards β · (log π - log π_ref) rank them."""

    def __init__(self, pairs: Sequence[Pair], trainer: Trainer, config: RunConfig, context: StageContext) -> None:
        self.pairs, self.trainer, self.config, self.context = pairs, trainer, config, context
        self.texts = [(p.prompt, response) for p in pairs for response in (p.chosen, p.rejected)]
        self.reference: list[float] = []

    def rewards(self) -> tuple[list[float], list[float]]:
        """Of the chosen and of the rejected responses."""
        model: Any = self.trainer.model
        if not self.reference:  # it never changes
            off = model.disable_adapter() if self.trainer.ref_model is None else contextlib.nullcontext()
            with off:
                self.reference = self._logprobs(self.trainer.ref_model or model)
        logprobs = zip(self._logprobs(model), self.reference, strict=True)
        rewards = [self.config.dpo.beta * (policy - reference) for policy, reference in logprobs]
        return rewards[::2], rewards[1::2]

    def report(self, chosen: list[float], rejected: list[float]) -> dict[str, Any]:
        """The report of a reward model, and `loss`, the mean DPO loss."""
        report = reward_report(
            chosen_scores=chosen,
            rejected_scores=rejected,
            ratings=[pair.row.rating for pair in self.pairs],
            tags=[pair.row.tag for pair in self.pairs],
            prompts=[normalised_prompt(pair.row.prompt) for pair in self.pairs],
            chosen_lengths=[len(pair.chosen) for pair in self.pairs],
            rejected_lengths=[len(pair.rejected) for pair in self.pairs],
        )
        return report | {"loss": float(_losses(chosen, rejected).mean())}

    def rows_by_pair(self, chosen: list[float], rejected: list[float]) -> list[dict[str, Any]]:
        """What `accuracy` and `loss` of the report are the means of, a row per pair."""
        values = {"accuracy": wins(chosen, rejected), "loss": _losses(chosen, rejected).tolist()}
        return pair_rows([pair.row for pair in self.pairs], values)

    @torch.no_grad()
    def _logprobs(self, model: Any) -> list[float]:
        """log p of each response, on every rank; each rank reads its shard, texts of similar length together."""
        config, device, texts = self.config, self.context.device, self.texts
        pad_id: Any = self.trainer.processing_class.pad_token_id  # type: ignore[union-attr]
        was_training = model.training
        model.eval()
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])), reverse=True)
        mine = [texts[order[i]] for i in collectives.even_shard(len(texts))]
        found: list[float] = []
        for start in range(0, len(mine), config.dpo.micro_batch_size):
            part = mine[start : start + config.dpo.micro_batch_size]
            tokens_BT, mask_BT = (x.to(device) for x in pad([prompt + response for prompt, response in part], pad_id))
            prompts_B1 = torch.tensor([[len(prompt)] for prompt, _ in part], device=device)
            response_BT = mask_BT & (torch.arange(tokens_BT.shape[1], device=device) >= prompts_B1)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.hardware.precision == "bf16"):
                out = model(
                    input_ids=tokens_BT,
                    attention_mask=mask_BT.long(),
                    labels=tokens_BT.masked_fill(~response_BT, IGNORED),
                    fused_lm_head=True,
                    use_cache=False,
                )
            found += out.log_probs.sum(1).float().tolist()
        model.train(was_training)
        by_place = dict(zip(order, collectives.join_shards(found, len(texts)), strict=True))
        return [by_place[i] for i in range(len(texts))]


def _losses(chosen: list[float], rejected: list[float]) -> Tensor:
    gaps = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(rejected, dtype=torch.float64)
    return -nn.functional.logsigmoid(gaps)
