"""Stage 2, one reward model on preference pairs, on TRL: ranking loss with margins, float32 head, centred on SFT
responses.

Llama 2, §3.2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig as TRLConfig
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from reward_data import Preference, normalised_prompt
from rlhf.algorithms.losses import safety_loss
from rlhf.chat import format_of
from rlhf.config import RunConfig
from rlhf.data import draw_rows, encode_demonstrations, encode_preferences, mix_preferences, pad
from rlhf.distributed import collectives
from rlhf.distributed.engine import end_sharded_loading, sharded_loading
from rlhf.distributed.sequence import group_of
from rlhf.errors import UserError
from rlhf.evaluation.held_out import write as write_rows
from rlhf.evaluation.reward_report import pair_rows, reward_report, wins
from rlhf.models import ScalarModel, add_lora, check_model, divide_sequences, last_value, load_scalar, load_tokenizer
from rlhf.runs import provenance
from rlhf.runs.artifacts import Artifact
from rlhf.runs.context import StageContext
from stages.trl_trainer import OwnTraining, Reporter, fit, for_groups, in_training_order, silence, trainer_arguments


class PairScorer(nn.Module):
    """A ScalarModel with the interface of a classifier that TRL's RewardTrainer expects."""

    def __init__(self, scalar: ScalarModel) -> None:
        super().__init__()
        self.scalar = scalar
        self.config = scalar.config
        self.config.num_labels = 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        scores_B = last_value(self.scalar(input_ids, attention_mask.bool()), attention_mask.bool())
        return SequenceClassifierOutput(logits=scores_B[:, None])  # type: ignore[arg-type]

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        backbone: Any = self.scalar.backbone
        backbone.gradient_checkpointing_enable(**settings)

    def add_model_tags(self, tags: Any) -> None:
        """Ignores TRL's tags."""


class Collator(DataCollatorForPreference):
    """Pairs as TRL batches them, and whether each side is safe: 1, 0, or -1 if unknown."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sides = [e["chosen_is_safe"] for e in examples] + [e["rejected_is_safe"] for e in examples]
        return super().torch_call(examples) | {"is_safe": torch.tensor(sides)}


class Trainer(OwnTraining, RewardTrainer):
    safety_loss_weight: float

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **unused: Any) -> Any:
        """L_rank + λ · BCE(σ(r), is_safe) on both sides."""
        is_safe_B = inputs.pop("is_safe")
        loss, outputs = cast(tuple[Tensor, Any], super().compute_loss(model, inputs, return_outputs=True))
        if self.safety_loss_weight:
            total, _ = safety_loss(outputs.logits[:, 0], is_safe_B.float(), is_safe_B >= 0)
            # Divided by all responses, known or not: a constant, so no split into micro-batches changes the gradient.
            loss = loss + self.safety_loss_weight * total / len(is_safe_B)
        return (loss, outputs) if return_outputs else loss


def main(config: RunConfig, context: StageContext) -> Artifact:
    """Trains the reward model that `context.stage` names; the artifact is an ordinary one-label classifier folder."""
    silence()
    reward, settings = config.reward, config.reward.models[context.stage.split("/")[1]]
    sft = context.inputs["sft"].path
    tokenizer = load_tokenizer(sft)
    data = provenance.stage_data(config, context.roles)
    preferences = mix_preferences(data["preferences"].train, settings, config.seed)
    pairs = encode_preferences(tokenizer, preferences, reward.margin, reward.max_length)
    lengths = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
    train = in_training_order(Dataset.from_list(pairs), lengths, reward, context.stage, config.seed)
    steps = len(train) // reward.batch_size
    train = for_groups(train, reward, context)
    held_out = HeldOut(tokenizer, data["preferences"].held_out, settings.own_tag, reward.max_length)

    arguments = trainer_arguments(config, reward, context, steps)
    with sharded_loading(config.hardware, context.local):
        model = load_scalar(sft, attention=config.model.attention)
    check_model(config, model.config)
    divide_sequences(model.backbone, group_of(context.sequence_parallel))
    if config.model.lora is not None:
        model = add_lora(model, config.model.lora, "scalar", config.seed)
    scorer = PairScorer(model)
    trainer = Trainer(
        model=scorer,  # type: ignore[arg-type]
        args=TRLConfig(**arguments, max_length=None, disable_dropout=True),
        train_dataset=train,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.optim, trainer.safety_loss_weight = reward.optim, settings.safety_loss_weight

    def score(rows: Sequence[Sequence[int]]) -> list[float]:
        return score_all(scorer, rows, config, context, tokenizer.pad_token_id)

    def measure() -> dict[str, float]:
        return {"reward/held_out_accuracy": held_out.report(held_out.score(score))["accuracy"]["value"]}

    names = {"loss": "reward/loss", "accuracy": "reward/accuracy", "margin": "reward/margin"}
    names |= {"mean_reward": "reward/mean", "grad_norm": "reward/grad_norm", "learning_rate": "reward/lr"}
    fit(trainer, Reporter(context, names, "reward/accuracy", reward.evals, measure))

    responses = [*data["demonstrations"].held_out, *data["demonstrations"].train]
    responses, _ = draw_rows(responses, reward.center_rows, config.seed)
    responses = encode_demonstrations(tokenizer, responses, reward.max_length)
    scores = score([row["input_ids"] for row in responses])
    on_pairs = held_out.score(score)
    metrics = held_out.report(on_pairs) | {"offset": sum(scores) / len(scores), "steps": steps}
    rows, parents = held_out.rows_by_pair(on_pairs), provenance.parents(data, context.inputs)
    return _commit(config, context, scorer, tokenizer, parents, metrics, rows)


Score = Callable[[Sequence[Sequence[int]]], list[float]]
PairScores = tuple[list[float], list[float]]  # of chosen, of rejected


class HeldOut:
    """Held-out pairs that fit into the length, and the report on them."""

    def __init__(self, tokenizer: Any, rows: Sequence[Preference], own_tag: str, max_length: int) -> None:
        encode = format_of(tokenizer).encode_response
        encoded = [[encode(r.prompt, side) for side in (r.chosen, r.rejected)] for r in rows]
        fitting = [(r, *sides) for r, sides in zip(rows, encoded, strict=True) if max(map(len, sides)) <= max_length]
        if not fitting:
            raise UserError(f"all held-out preferences are over {max_length} tokens; raise reward.max_length", 3)
        self.rows, self.chosen, self.rejected = zip(*fitting, strict=True)
        self.own = [i for i, row in enumerate(self.rows) if row.tag == own_tag]

    def score(self, score: Score) -> PairScores:
        """The scores of the chosen and of the rejected responses."""
        scores = score([*self.chosen, *self.rejected])
        return scores[: len(self.rows)], scores[len(self.rows) :]

    def report(self, scores: PairScores) -> dict[str, Any]:
        """The report on pairs of the model's own tag, and `by_tag` on all of them."""
        chosen, rejected = scores

        def on(indices: Sequence[int]) -> dict[str, Any]:
            return reward_report(
                chosen_scores=[chosen[i] for i in indices],
                rejected_scores=[rejected[i] for i in indices],
                ratings=[self.rows[i].rating for i in indices],
                tags=[self.rows[i].tag for i in indices],
                prompts=[normalised_prompt(self.rows[i].prompt) for i in indices],
                chosen_lengths=[len(self.chosen[i]) for i in indices],
                rejected_lengths=[len(self.rejected[i]) for i in indices],
            )

        everything = on(range(len(self.rows)))
        return (on(self.own) if self.own else everything) | {"by_tag": everything["by_tag"]}

    def rows_by_pair(self, scores: PairScores) -> list[dict[str, Any]]:
        """What `accuracy` of the report is the mean of, a row per pair."""
        indices = self.own or range(len(self.rows))
        accuracy = wins(*([side[i] for i in indices] for side in scores))
        return pair_rows([self.rows[i] for i in indices], {"accuracy": accuracy})


@torch.no_grad()
def score_all(
    model: nn.Module, rows: Sequence[Sequence[int]], config: RunConfig, context: StageContext, pad_id: int
) -> list[float]:
    """The raw score of every row, on every rank; each rank reads its shard, rows of similar length together."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    mine = [rows[order[i]] for i in collectives.even_shard(len(rows), context.sequence_parallel)]
    scores: list[float] = []
    for start in range(0, len(mine), config.reward.micro_batch_size):
        tokens_BT, mask_BT = pad(mine[start : start + config.reward.micro_batch_size], pad_id)
        with torch.autocast(context.device.type, torch.bfloat16, enabled=config.hardware.precision == "bf16"):
            out = model(input_ids=tokens_BT.to(context.device), attention_mask=mask_BT.to(context.device))
        scores += out.logits[:, 0].float().tolist()
    model.train(was_training)
    by_place = dict(zip(order, collectives.join_shards(scores, len(rows), context.sequence_parallel), strict=True))
    return [by_place[i] for i in range(len(rows))]


def _commit(
    config: RunConfig,
    context: StageContext,
    scorer: PairScorer,
    tokenizer: Any,
    parents: dict[str, str],
    metrics: dict[str, Any],
    rows: list[dict[str, Any]],
) -> Artifact:
    end_sharded_loading()
    scorer.scalar.offset = metrics["offset"]
    return provenance.commit(
        config,
        context,
        parents,
        metrics,
        weights=lambda folder: scorer.scalar.save(folder, tokenizer, all_ranks=True),
        write=lambda folder: write_rows(folder, rows),
    )
