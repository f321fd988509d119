"""The stages of the pipeline: what a stage is, and the registry.

The command line, the pipeline, preflight and the report read this registry. A new stage is a line here and a file
`stages/<name>.py`, which is imported only when the stage runs: nothing here imports a library.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.config import RunConfig
    from rlhf.data import Split
    from rlhf.runs.artifacts import Artifact
    from rlhf.runs.context import StageContext


def _sft(config: RunConfig) -> list[str]:
    return ["sft"]


def _reward_models(config: RunConfig) -> list[str]:
    return [f"reward/{name}" for name in config.reward.models]


def _ppo_inputs(config: RunConfig) -> list[str]:
    return ["sft", *(f"reward/{name}" for name in dict.fromkeys(config.ppo.reward_models.values()))]


def _check_mixture(config: RunConfig, part: str, data: Mapping[str, Split]) -> None:
    from rlhf.data import mix_preferences

    mix_preferences(data["preferences"].train, config.reward.models[part.removeprefix("reward/")], config.seed)


def _check_ppo(config: RunConfig, part: str, data: Mapping[str, Split]) -> None:
    from rlhf.data import split_held_out

    split_held_out(data["prompts"].held_out, config.ppo.eval_prompts, config.seed)
    if config.ppo.names_code:
        from rlhf.ppo.setup import check_code

        check_code(config, data["prompts"].train)


@dataclass(frozen=True)
class Stage:
    name: str
    """Its name in `pipeline` and on the command line, of its section of the settings, and of its module in
    `stages/`."""
    roles: tuple[str, ...]
    """The data that it reads: demonstrations, preferences, prompts."""
    inputs: Callable[[RunConfig], list[str]] = lambda config: []
    """Parts of other stages from whose artifacts it starts."""
    parts: Callable[[RunConfig], list[str]] | None = None
    """`name/PART` of each part that runs separately; None: the stage is a single part with its own name."""
    workers: Callable[[RunConfig], int] = lambda config: config.hardware.workers
    check_data: Callable[[RunConfig, str, Mapping[str, Split]], None] = lambda config, part, data: None
    """Raises UserError (3), before anything runs, for data that a part could not use."""

    def parts_of(self, config: RunConfig) -> list[str]:
        return self.parts(config) if self.parts else [self.name]

    def run(self, config: RunConfig, context: StageContext) -> Artifact:
        """Runs the part that `context.stage` names, on every rank."""
        return import_module(f"stages.{self.name}").main(config, context)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("sft", ("demonstrations",)),
        Stage(
            "reward",
            ("preferences", "demonstrations"),
            inputs=_sft,
            parts=_reward_models,
            workers=lambda config: config.reward_workers,
            check_data=_check_mixture,
        ),
        Stage("dpo", ("preferences",), inputs=_sft),
        Stage("ppo", ("prompts",), inputs=_ppo_inputs, check_data=_check_ppo),
    )
}


def stage_of(part: str) -> Stage:
    """The stage of a part: `reward/safety` → the stage `reward`."""
    return STAGES[part.partition("/")[0]]


def parts_of(config: RunConfig) -> list[str]:
    """All parts of a run in the order of its pipeline: sft, reward/helpfulness, reward/safety, ppo."""
    return [part for name in config.pipeline for part in STAGES[name].parts_of(config)]


def misfits(config: RunConfig) -> Iterator[str]:
    """Mistakes in `pipeline`, one line each, starting with the dotted name of the setting to change."""
    for place, name in enumerate(config.pipeline):
        before = config.pipeline[:place]
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(STAGES)}"
            yield f"pipeline.{place} is {name!r}, which is no stage ({hint})"
            continue
        if name in before:
            yield f"pipeline.{place} is {name}, which is in the pipeline already; leave it out"
        for needed in dict.fromkeys(stage_of(part).name for part in STAGES[name].inputs(config)):
            if needed not in before:
                verb = "move" if needed in config.pipeline else "add"
                yield f"pipeline.{place} is {name}, which starts from {needed}; {verb} {needed} before it"
        for role in STAGES[name].roles:
            if getattr(config.data, role) is None:
                yield f"data.{role} is missing; {name} reads it"
