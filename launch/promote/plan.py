"""What two policies are compared on: prompts, rewards and sampling of the candidate's run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from launch.evaluate.policy.evaluate import load_prompts
from launch.evaluate.policy.policies import Settings
from launch.evaluate.policy.rewards import named
from reward_data import Prompt
from rlhf.config import RunConfig
from rlhf.data import parsed, split_held_out
from rlhf.errors import UserError
from rlhf.evaluation.gate import SAFETY

GOLD = "reward_data.gold:gold"


@dataclass(frozen=True)
class Plan:
    prompts: Sequence[Prompt]
    rewards: dict[str, str]  # name → folder or code
    reward: str  # the one that must rise
    settings: Settings


def plan(artifact: Path, kind: str, prompts: Sequence[str] | None, reward: str | None) -> Plan:
    """`artifact`: the candidate's folder. UserError (2, 3, 4) if something is missing."""
    config = settings_of(artifact, kind)
    rewards = rewards_of(config)
    if reward and "=" in reward:
        rewards |= named([reward])
    usual = [name for name in rewards if name != SAFETY] or [*rewards, ""]  # safety is a guard
    chosen = (reward or usual[0]).partition("=")[0]
    if chosen not in rewards:
        raise UserError(f"--reward {chosen}: the run has {', '.join(rewards) or 'no reward'}; give NAME=REWARD")
    sampling = config.ppo.sampling
    settings = Settings(temperature=sampling.temperature, max_new_tokens=sampling.max_new_tokens, bad_rows="skip")
    return Plan(load_prompts(prompts) if prompts else held_out(config), rewards, chosen, settings)


def rewards_of(config: RunConfig) -> dict[str, str]:
    """The rewards of a run, gold first, then in the order of its settings."""
    gold = {"gold": GOLD} if config.data.gold == "shipped" else {}
    if config.ppo.rewards:
        of_run = {name: source.function or source.model or "" for name, source in config.ppo.rewards.items()}
        models = {name for name, source in config.ppo.rewards.items() if source.model}
    else:
        of_run = {name: name for name in config.ppo.reward_models.values()} if "reward" in config.pipeline else {}
        models = set(of_run)
    folders = {name: str(config.folder / "reward" / one / "artifact") for name, one in of_run.items() if name in models}
    return gold | of_run | folders


def held_out(config: RunConfig) -> list[Prompt]:
    """Without the prompts by which PPO chose its best iteration: there a candidate would look better than it is."""
    file = parsed.held_out_file(config, "prompts")
    if not file.exists():
        raise UserError(f"{file} does not exist: name the prompts (--prompts FILE)", 4)
    rows = parsed.read_rows(file, "prompts")
    return split_held_out(rows, config.ppo.eval_prompts, config.seed)[1] if "ppo" in config.pipeline else rows


def settings_of(artifact: Path, kind: str) -> RunConfig:
    """The settings of the run of an artifact, which may lie elsewhere now. UserError (4) if they are not there."""
    path, run = artifact.parent / "config.yaml", artifact.absolute().parents[1 + kind.count("/")]
    if not path.exists():
        raise UserError(f"{path} does not exist: the settings of a run lie beside its artifacts", 4)
    config = RunConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    return config.model_copy(update={"runs_dir": run.parent, "name": run.name})
