"""Stage 3, PPO: trains the SFT policy to maximise its rewards, and keeps the best policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_data import Prompt
from rlhf.config import RunConfig
from rlhf.data import short_prompts, split_held_out
from rlhf.evaluation import held_out
from rlhf.generation import sampler_of
from rlhf.models import resolve
from rlhf.ppo import best
from rlhf.ppo.models import open_models
from rlhf.ppo.setup import Setup, reward_set
from rlhf.ppo.trainer import PPOTrainer
from rlhf.runs import provenance
from rlhf.runs.artifacts import Artifact, link_tree
from rlhf.runs.context import StageContext


def main(config: RunConfig, context: StageContext) -> Artifact:
    """Trains the policy and returns the artifact of the iteration with the best held-out reward."""
    data = provenance.stage_data(config, context.roles)
    names = dict.fromkeys(config.ppo.reward_models.values())
    models = open_models(config, context, {name: context.inputs[f"reward/{name}"].path for name in names})
    prompts, others = (
        short_prompts(models.tokenizer, rows, config.ppo.max_prompt_length)
        for rows in (data["prompts"].train, data["prompts"].held_out)
    )
    for_choice, for_report = split_held_out(others, config.ppo.eval_prompts, config.seed)
    setup = Setup(config, context, models, reward_set(config, models), prompts, for_choice)
    trainer = PPOTrainer.of(setup).train()
    metrics, rows = _report(config, context, trainer, for_report)

    def write(folder: Path) -> None:
        link_tree(trainer.best_folder, folder)
        held_out.write(folder, rows)

    return provenance.commit(config, context, provenance.parents(data, context.inputs), metrics, write=write)


def _report(
    config: RunConfig, context: StageContext, trainer: PPOTrainer, prompts: Sequence[Prompt]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of base, SFT and best policy on prompts that were not used to select, and their values by prompt. One
    model at a time is in memory."""
    folders = {"base": resolve(config), "sft": context.inputs["sft"].path, "ppo": trainer.best_folder}
    responses, sampler = {}, trainer.models.sampler
    for name, folder in folders.items():
        sampler = sampler_of(folder, sampler, config, trainer.models.tokenizer, context.device)
        responses[name] = trainer.evaluator.evaluate(prompts, sampler)
    compared, state = best.compare(prompts, responses), trainer.state
    context.tracker.table("held_out_answers", compared["samples"])
    compared |= {"iterations": state.iteration, "best_iteration": state.best_iteration, "alarms": state.alarms}
    return compared, best.rows_by_prompt(prompts, responses)
