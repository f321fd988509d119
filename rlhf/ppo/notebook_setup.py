"""The setup of a PPOTrainer in one process, from a model, rewards and prompts in memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from tqdm.auto import tqdm

from reward_data import Prompt
from rlhf.api import RewardModel, messages_of
from rlhf.config import DataConfig, PPOConfig, RoleConfig, RunConfig, TrackingConfig
from rlhf.data import short_prompts
from rlhf.distributed.engine import prepare_environment
from rlhf.errors import UserError
from rlhf.models import find_model
from rlhf.ppo.models import open_models
from rlhf.ppo.setup import Setup
from rlhf.rewards import FunctionReward, ModelReward, Reward, RewardSet, is_reward, weighted_sum
from rlhf.runs.artifacts import Artifact, digest_of, write_json
from rlhf.runs.context import Progress, StageContext
from rlhf.tracking import NullTracker, open_tracker

MADE_BY = "made_by.json"
"""In the trainer's folder: a digest of what its checkpoints were made with."""


def local_setup(
    model: Any,
    rewards: Mapping[str, Any],
    prompts: tuple[Sequence[Any], Sequence[Any]],
    config: RunConfig,
    folder: Path,
    keep: bool,
) -> Setup:
    """Models, rewards and (training, held-out) prompts of a trainer that is alone in its process, in `folder`, which the
    user will `keep`. UserError for what cannot be used."""
    prepare_environment()
    rows = [_prompts(given, name) for given, name in zip(prompts, ("prompts", "held_out"), strict=True)]
    if not rows[0]:
        raise UserError("prompts is empty")
    if not isinstance(rewards, Mapping) or not rewards:
        raise UserError("rewards must name at least one reward, for example rewards={'short': my_function}")
    model_folder = _model_folder(model, folder)
    if keep:
        _claim(folder, [config, str(model), sorted(rewards), *rows])
    context = StageContext(
        stage="ppo",
        rank=0,
        world_size=1,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        folder=folder,
        inputs={"sft": model_folder},
        tracker=open_tracker(folder, TrackingConfig(uri=None), "ppo", None, True) if keep else NullTracker(),
        progress=Bar(folder),
        local=True,
    )
    models = open_models(config, context, {})
    train, held_out = (short_prompts(models.tokenizer, part, config.ppo.max_prompt_length) for part in rows)
    reward_set = _reward_set(rewards, config, models.tokenizer)
    for reward in reward_set.rewards.values():
        if isinstance(reward, FunctionReward):
            reward.check_columns(train)
    return Setup(config, context, models, reward_set, train, held_out)


def run_config(ppo: PPOConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The settings of a run with these of PPO, and other sections. UserError with all that does not fit together."""
    if ppo.rewards:
        raise UserError("config.rewards is for run files; give the rewards to PPOTrainer(rewards=…)")
    nothing = RoleConfig(train=[])
    data = DataConfig(demonstrations=nothing, preferences=nothing, prompts=nothing)
    try:
        given = {"name": "ppo", "pipeline": ["ppo"], "data": data, **settings, "ppo": ppo}
        return RunConfig.model_validate(given).with_fitting_micro_batches()
    except ValidationError as error:
        lines = []
        for one in error.errors():
            place = ".".join(map(str, one["loc"]))
            lines += [
                f"{place}: {line}" if place else line for line in one["msg"].removeprefix("Value error, ").splitlines()
            ]
        raise UserError("\n".join(lines)) from error


def _claim(folder: Path, made_by: list[Any]) -> None:
    """UserError (2) where the folder holds checkpoints of another training: resuming would mix the two."""
    config = made_by[0].model_dump(mode="json")
    for key in ("iterations", "eval_every", "checkpoint_every", "patience", "logged_samples", "alarms"):
        config["ppo"].pop(key)
    digest = digest_of({"config": config, "rest": repr(made_by[1:])})
    file = folder / MADE_BY
    if file.is_file() and json.loads(file.read_text())["digest"] != digest:
        raise UserError(
            f"{folder} holds another training (other settings, model, prompts or names of rewards): name a new folder, or "
            "remove this one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"digest": digest})


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


def _model_folder(model: Any, place: Path) -> Artifact:
    """The folder of the model to train. A model in memory, given with its tokenizer, is saved first and does not
    change."""
    if isinstance(model, tuple):
        if isinstance(model[0], PeftModel):
            raise UserError(
                "model is a PEFT model: give its base and settings={'model': {'lora': {'rank': 16}}}, or merge it"
            )
        path = place / "model"
        for part in model:
            part.save_pretrained(path)
    elif isinstance(model, str | Path):
        path = find_model(model)
    else:
        raise UserError("model must be a folder, a hub name, or (model, tokenizer)")
    return Artifact("sft", path, digest="", parents={}, config_digest="", code_revision="", metrics={})


def _reward_set(rewards: Mapping[str, Any], config: RunConfig, tokenizer: Any) -> RewardSet:
    named, weights = {}, []
    for name, given in rewards.items():
        reward, weight = given if isinstance(given, tuple) else (given, 1.0)
        named[name] = _reward(name, reward, config, tokenizer)
        weights.append(float(weight))
    return RewardSet(named, weighted_sum(weights))


def _reward(name: str, reward: Any, config: RunConfig, tokenizer: Any) -> Reward:
    if isinstance(reward, RewardModel):
        return reward.as_reward(config, tokenizer)
    if isinstance(reward, FunctionReward | ModelReward) or is_reward(reward):
        return reward
    if not callable(reward):
        raise UserError(f"rewards[{name!r}] is a {type(reward).__name__}; give a function or an rlhf.RewardModel")
    return FunctionReward(name, reward)


def _prompts(rows: Sequence[Any], argument: str) -> list[Prompt]:
    if isinstance(rows, str):
        raise UserError(f"{argument} is one text; give a list of texts or rows")
    return [_prompt(row, number, argument) for number, row in enumerate(rows)]


def _prompt(row: Any, number: int, argument: str) -> Prompt:
    """A text, {"prompt": text, …}, {"messages": [{"role": …, "content": …}, …], …} or a Prompt. Other keys are
    columns."""
    if isinstance(row, Prompt):
        return row
    source = f"{argument}[{number}]"
    if isinstance(row, str):
        return Prompt(messages_of(row), "helpful", source)
    if not isinstance(row, Mapping) or not ("prompt" in row or "messages" in row):
        raise UserError(f"{source} is {str(row)[:60]!r}: give a text, or a row with 'prompt' or 'messages'")
    messages = messages_of(row.get("messages", row.get("prompt")))
    columns = {key: value for key, value in row.items() if key not in ("prompt", "messages", "tag")}
    return Prompt(messages, row.get("tag", "helpful"), source, columns)
