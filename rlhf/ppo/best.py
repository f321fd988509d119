"""The best policy of PPO: kept during training, compared with base and SFT model at the end."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from reward_data import Prompt, normalised_prompt
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.evaluation.held_out import rows_of
from rlhf.evaluation.policy_report import HeldOutResponses, gain, policy_report, values_by_prompt
from rlhf.evaluation.statistics import Estimate
from rlhf.models import ScalarModel, save_causal
from rlhf.models.policy import PolicyModel
from rlhf.ppo.models import Models
from rlhf.ppo.tables import before_and_after
from rlhf.runs import checkpoint
from rlhf.runs.artifacts import write_json


def keep(checkpoints: Path, models: Models, iteration: int) -> Path:
    """Saves policy and critic as ordinary folders, and removes older ones that no checkpoint names."""
    best = checkpoint.best_folder(checkpoints, iteration)
    partial = best.with_name("partial")
    collectives.rank_zero_only(lambda: shutil.rmtree(partial, ignore_errors=True), f"removing {partial}")

    def finish() -> None:
        shutil.rmtree(best, ignore_errors=True)
        partial.rename(best)
        checkpoint.forget_bests(checkpoints, iteration)

    save(partial, models)
    collectives.rank_zero_only(finish, f"keeping {best}")
    return best


def save(folder: Path, models: Models) -> None:
    """Policy and, if there is one, critic in the new `folder`, each an ordinary folder of transformers. All ranks must
    call it.
    """
    save_causal(cast(PolicyModel, models.policy.module).causal, folder, models.tokenizer, all_ranks=True)
    if models.critic is not None:
        cast(ScalarModel, models.critic.module).save(folder / "critic", models.tokenizer, all_ranks=True)


SAVED = "ppo_trainer.json"
"""Says that a folder was written by `PPOTrainer.save`, so that the next save may replace it."""


def make_room(folder: Path, partial: Path) -> None:
    """UserError (2) where `folder` holds files that no save wrote; they are never removed."""
    if folder.exists() and not (folder / SAVED).is_file() and any(folder.iterdir()):
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise UserError(f"{folder} is not empty (it holds {inside}) and no earlier save: name a new folder")
    shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, folder: Path, mark: dict[str, Any]) -> None:
    """The complete folder `partial` becomes `folder`."""
    write_json(partial / SAVED, mark)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def compare(prompts: Sequence[Prompt], responses: Mapping[str, HeldOutResponses]) -> dict[str, Any]:
    """The artifact's metrics of base, SFT and PPO policy on prompts that were not used to select."""
    reports = {name: _as_dicts(policy_report(one, prompts)) for name, one in responses.items()}
    return {
        "held_out": reports,
        "gain": _as_dicts(gain(responses["ppo"], responses["sft"], prompts)),
        "kl": reports["ppo"]["kl"]["value"],
        "samples": before_and_after(prompts, responses),
    }


def rows_by_prompt(prompts: Sequence[Prompt], responses: Mapping[str, HeldOutResponses]) -> list[dict[str, Any]]:
    """What `compare` is the mean of, a row per prompt. Metrics of other policies than PPO's begin with their names."""
    texts = [normalised_prompt(prompt.messages) for prompt in prompts]
    values = {
        name if policy == "ppo" else f"{policy}.{name}": column
        for policy, own in responses.items()
        for name, column in values_by_prompt(own, prompts).items()
    }
    return rows_of(texts, texts, values)


def _as_dicts(report: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.as_dict() for name, estimate in report.items()}
