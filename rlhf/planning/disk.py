"""What a run needs on the disk of its folder."""

from __future__ import annotations

from rlhf.config import RunConfig, SupervisedConfig
from rlhf.planning.shapes import shape_of

WEIGHT_BYTES = 4  # of a parameter of an artifact, float32
STATE_BYTES = 12  # of a parameter of a checkpoint: its weight and the two moments of Adam, float32
CHECKPOINTS = 3  # two are kept while the next one is written
BEST_MODELS = 2  # the best of PPO so far, and a better one while it is written


def disk_bytes(config: RunConfig, parameters: int) -> int:
    """What lies there at the peak, with a base model of so many parameters: the artifacts of all stages so far, and of
    the stage that runs the checkpoints, which go when it has its artifact."""
    artifacts, most = 0, 0
    for stage in config.pipeline:
        models = _models(config, stage)
        beside = min(models, max(1, config.hardware.workers // config.reward_workers)) if stage == "reward" else models
        artifacts += models * parameters * WEIGHT_BYTES
        most = max(most, artifacts + beside * _checkpoints(config, stage, parameters))
    return most


def _models(config: RunConfig, stage: str) -> int:
    """Whole models in the artifacts of a stage, each of which was trained."""
    if stage == "ppo":
        return 2 if config.ppo.advantage == "gae" else 1
    return len(config.reward.models) if stage == "reward" else 1


def _checkpoints(config: RunConfig, stage: str, parameters: int) -> int:
    """Bytes of the checkpoints of one model, where most of them lie there."""
    trained = parameters
    if config.model.lora is not None:
        shape = shape_of(config.model)
        trained = shape.adapter(config.model.lora) if shape else 0
    if stage != "ppo":
        own = getattr(config, stage, None)
        written = own.checkpoints if isinstance(own, SupervisedConfig) else 0
        return min(CHECKPOINTS, written) * trained * STATE_BYTES
    written = min(CHECKPOINTS, config.ppo.iterations // config.ppo.checkpoint_every)
    return written * trained * STATE_BYTES + BEST_MODELS * parameters * WEIGHT_BYTES
