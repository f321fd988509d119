"""The best policy of a PPO stage: kept while training goes on, reported and sealed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from rlhf.config import RunConfig
from rlhf.distributed import collectives
from rlhf.distributed.engine import full_state
from rlhf.evaluation.policy_report import gain, policy_report
from rlhf.evaluation.statistics import Estimate
from rlhf.generation import sampler_of
from rlhf.models import ScalarModel, resolve, save_causal
from rlhf.models.policy import PolicyModel
from rlhf.ppo.samples import before_and_after
from rlhf.runs import checkpoint, provenance
from rlhf.runs.artifacts import Artifact, link_tree
from rlhf.runs.context import StageContext

if TYPE_CHECKING:
    from stages.ppo import Judge, Models


def keep(context: StageContext, models: Models, iteration: int) -> None:
    """Saves policy and critic as ordinary folders, and lets go of those that no checkpoint can go back to.

    One after the other, so that the writer's main memory holds one model.
    """
    best = checkpoint.best_folder(context.checkpoint_folder, iteration)
    partial = best.with_name("partial")
    policy, critic = cast(PolicyModel, models.policy.module), cast(ScalarModel, models.critic.module)

    def save_policy(state: dict[str, Tensor]) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        plain = {name.removeprefix("causal."): tensor for name, tensor in state.items()}
        save_causal(policy.causal, partial, models.tokenizer, plain)

    def save_critic(state: dict[str, Tensor]) -> None:
        critic.save(partial / "critic", models.tokenizer, state)
        shutil.rmtree(best, ignore_errors=True)
        partial.rename(best)
        checkpoint.forget_bests(context.checkpoint_folder, iteration)

    for module, save in ((policy, save_policy), (critic, save_critic)):
        _save_whole(module, save, best)


def _save_whole(module: nn.Module, save: Callable[[dict[str, Tensor]], None], folder: Path) -> None:
    state = full_state(module, keep=collectives.rank() == 0)
    collectives.rank_zero_only(lambda: save(state), f"saving a model to {folder}")


def finish(
    config: RunConfig,
    context: StageContext,
    models: Models,
    judge: Judge,
    prompts: Sequence[Any],
    state: dict[str, Any],
    parents: dict[str, str],
) -> Artifact:
    """Reports base, SFT and best policy on the prompts that chose nothing, and seals the artifact."""
    best = checkpoint.best_folder(context.checkpoint_folder, state["best_iteration"])
    answers, sampler = {}, models.sampler
    for name, path in (("base", resolve(config)), ("sft", context.inputs["sft"].path), ("ppo", best)):
        sampler = sampler_of(path, sampler, config, models.tokenizer, context.device)
        answers[name] = judge.answers(prompts, sampler)
    metrics = {
        "held_out": {name: _as_dicts(policy_report(a, prompts)) for name, a in answers.items()},
        "gain": _as_dicts(gain(answers["ppo"], answers["sft"], prompts)),
        "kl": sum(answers["ppo"].kl) / len(prompts),
        "iterations": state["iteration"],
        "best_iteration": state["best_iteration"],
        "alarms": state["alarms"],
        "samples": before_and_after(prompts, answers),
    }
    context.tracker.table("held_out_answers", metrics["samples"])

    return provenance.commit(config, context, lambda folder: link_tree(best, folder), parents, metrics)


def _as_dicts(report: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.as_dict() for name, estimate in report.items()}
