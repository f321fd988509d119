"""The setup of a PPOTrainer in one process, from a model, rewards and prompts in memory."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from tqdm.auto import tqdm

from reward_data import Message, Prompt
from rlhf.config import DataConfig, PPOConfig, RoleConfig, RunConfig, TrackingConfig
from rlhf.data import short_prompts
from rlhf.distributed.engine import prepare_environment
from rlhf.errors import UserError
from rlhf.models import find_model
from rlhf.ppo.models import open_models
from rlhf.ppo.setup import Setup
from rlhf.rewards import FunctionReward, Reward, RewardSet, weighted_sum
from rlhf.runs.artifacts import Artifact
from rlhf.runs.context import Progress, StageContext
from rlhf.tracking import NullTracker, open_tracker


def local_setup(
    model: Any,
    rewards: Mapping[str, Any],
    prompts: tuple[Sequence[Any], Sequence[Any]],
    ppo: PPOConfig,
    folder: str | Path | None,
    seed: int,
) -> Setup:
    """Models, rewards and (training, held-out) prompts of a trainer in a single process. UserError for what cannot be
    used."""
    prepare_environment()
    place = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="rlhf-ppo-"))
    config = _run_config(ppo, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = StageContext(
        stage="ppo",
        rank=0,
        world_size=1,
        device=device,
        folder=place,
        inputs={"sft": _model_folder(model, place)},
        tracker=open_tracker(place, TrackingConfig(uri=None), "ppo", None, True) if folder else NullTracker(),
        progress=Bar(place),
        local=True,
    )
    models = open_models(config, context, {})
    named = {name: _reward(name, reward, config) for name, reward in rewards.items()}
    if not named:
        raise UserError("rewards is empty: name at least one, for example rewards={'short': my_function}")
    kept, chosen_by = (
        short_prompts(models.tokenizer, [_prompt(row, i, name) for i, row in enumerate(rows)], ppo.max_prompt_length)
        for name, rows in zip(("prompts", "held_out"), prompts, strict=True)
    )
    if not kept:
        raise UserError("prompts is empty")
    for reward in named.values():
        if isinstance(reward, FunctionReward):
            reward.check_columns(kept)
    return Setup(config, context, models, RewardSet(named, weighted_sum([1.0] * len(named))), kept, chosen_by)


class Bar(Progress):
    """Progress as a bar in the terminal or the notebook."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, is_writer=False)
        self._bar: tqdm | None = None

    def warn(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def update(self, done: int, total: int, **metrics: float) -> None:
        self._bar = self._bar or tqdm(total=total, desc="PPO", unit="iteration")
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()}, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()


def _run_config(ppo: PPOConfig, seed: int) -> RunConfig:
    nothing = RoleConfig(train=[])
    data = DataConfig(demonstrations=nothing, preferences=nothing, prompts=nothing)
    try:
        return RunConfig(name="ppo", seed=seed, data=data, ppo=ppo).with_fitting_micro_batches()
    except ValidationError as error:
        lines = [line for one in error.errors() for line in one["msg"].removeprefix("Value error, ").splitlines()]
        raise UserError("\n".join(lines)) from error


def _model_folder(model: Any, place: Path) -> Artifact:
    """The folder of the model to train. A model in memory, given with its tokenizer, is saved first and does not
    change."""
    if isinstance(model, tuple):
        path = place / "model"
        for part in model:
            part.save_pretrained(path)
    elif isinstance(model, str | Path):
        path = find_model(model)
    else:
        raise UserError("model must be a folder, a hub name, or (model, tokenizer)")
    return Artifact("sft", path, digest="", parents={}, config_digest="", code_revision="", metrics={})


def _reward(name: str, reward: Any, config: RunConfig) -> Reward:
    from rlhf.api import RewardModel

    if isinstance(reward, RewardModel):
        return reward.as_reward(config)
    if not callable(reward):
        raise UserError(f"rewards[{name!r}] is a {type(reward).__name__}; give a function or an rlhf.RewardModel")
    return FunctionReward(name, reward)


def _prompt(row: Any, number: int, argument: str) -> Prompt:
    """A text, {"prompt": text, …}, {"messages": [{"role": …, "content": …}, …], …} or a Prompt. Other keys are
    columns."""
    if isinstance(row, Prompt):
        return row
    source = f"{argument}[{number}]"
    if isinstance(row, str):
        return Prompt((Message("user", row),), "helpful", source)
    if not isinstance(row, Mapping) or not ("prompt" in row or "messages" in row):
        raise UserError(f"{source} is {str(row)[:60]!r}: give a text, or a row with 'prompt' or 'messages'")
    said = row.get("messages", row.get("prompt"))
    messages = (
        (Message("user", said),) if isinstance(said, str) else tuple(Message(m["role"], m["content"]) for m in said)
    )
    columns = {key: value for key, value in row.items() if key not in ("prompt", "messages", "tag")}
    return Prompt(messages, row.get("tag", "helpful"), source, columns)
