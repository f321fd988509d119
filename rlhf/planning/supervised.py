"""What a worker's device and its host hold in SFT, reward training and DPO."""

from __future__ import annotations

from rlhf.config import RunConfig, SupervisedConfig
from rlhf.planning import activations
from rlhf.planning.engines import FLOAT, Layout, Model, Part, gathered, resting
from rlhf.planning.phases import Phase, host_of, save_parts, training_parts, with_allowance
from rlhf.planning.shapes import ModelShape

TEXTS = {"sft": 1, "reward": 2, "dpo": 2}  # of a row


def phases(stage: str, config: RunConfig, shape: ModelShape, layout: Layout, local: int) -> list[Phase]:
    """Opening, update (with the held-out evaluations, which need less) and saving."""
    settings: SupervisedConfig = getattr(config, stage)
    role = {"sft": "policy", "dpo": "policy", "reward": "reward model"}[stage]
    model = Model(role, shape, scalar=stage == "reward", learns=True, lora=config.model.lora)
    models = [model]
    if stage == "dpo" and config.model.lora is None:
        models.append(Model("reference", shape))
    rest = [part for one in models for part in resting(one, layout)]
    tokens = layout.slice(TEXTS[stage] * settings.micro_batch_size * settings.max_length)
    first = 0.0 if layout.local or layout.offload else model.trained / layout.shards * FLOAT
    opened = [
        *(part for part in rest if part.kind != "small weights, whole"),
        Part("worker", "first gradients", first),
        Part("worker", "weight in reading", shape.largest * FLOAT if layout.gathers else 0),
    ]
    learning = training_parts(model, layout, tokens, tokens, config.model.gradient_checkpointing)
    if len(models) > 1:
        learning = max(learning, _reads(models[1], layout, tokens), key=lambda parts: sum(p.bytes for p in parts))
    bucket, written = save_parts(model, layout, local)
    order = Part("worker", "shards in order", local * model.trained / layout.workers * FLOAT if layout.sharded else 0)
    return [
        Phase("opening", with_allowance(opened, layout), host_of(layout, local, models, order)),
        Phase("update", with_allowance([*rest, *learning], layout), host_of(layout, local, models)),
        Phase("saving", with_allowance([*rest, *bucket], layout), host_of(layout, local, models, *written)),
    ]


def _reads(model: Model, layout: Layout, tokens: int) -> list[Part]:
    return [
        Part(model.role, "gathered weights", gathered(model, layout, backward=False)),
        Part(model.role, "activations", activations.passing(model.shape, layout, tokens)),
        Part(model.role, "logits", activations.logits(model.shape, layout, tokens, backward=False)),
    ]
