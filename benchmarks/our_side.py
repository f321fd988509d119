"""Our side of `benchmarks.ppo_vs_trl`: `python -m benchmarks.our_side JOB RESULT`, alone or as a rank of torchrun."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from benchmarks.side import NEVER, Job, peak_memory
from benchmarks.turns import device_of
from rlhf.config import RunConfig
from rlhf.data import pad
from rlhf.data.batches import PromptBatch
from rlhf.distributed import collectives
from rlhf.generation import InProcessSampler, in_process
from rlhf.ppo import rollout_source, step_profiler
from rlhf.ppo.models import open_models
from rlhf.ppo.setup import Setup, reward_set
from rlhf.ppo.trainer import PPOTrainer
from rlhf.runs.artifacts import Artifact
from rlhf.runs.context import Progress, StageContext
from rlhf.tracking import NullTracker


def main(job: Job, result: Path) -> None:
    torch.set_num_threads(job.threads)
    if job.processes > 1:
        dist.init_process_group("gloo")
    config, context = RunConfig.model_validate(job.config), stage_context(job, result.parent)
    rollout_source.next_prompts = partial(prompts_of, job)
    trainer = PPOTrainer.of(open_setup(config, context, job.prompts))
    if job.eos is None:
        cast(InProcessSampler, trainer.models.sampler).stop_ids = [NEVER]
    if job.answers:
        load_dice(job)
    seconds, metrics = [], []
    trainer.timer.restart()
    for _ in range(job.iterations):
        collectives.barrier()
        trainer.state.iteration += 1
        start = time.perf_counter()
        metrics.append(trainer.step())
        seconds.append(time.perf_counter() - start)
        metrics[-1] |= step_profiler.close(trainer.timer, metrics[-1], trainer.machine)
    # On CUDA the clock begins the peak anew in each phase.
    on_device = [value for one in metrics for name, value in one.items() if name.startswith("perf/memory_")]
    memory = sum(collectives.gather_objects(max(on_device) if job.device == "cuda" else peak_memory()))
    if context.is_writer:
        lengths = [one["ppo/length"] for one in metrics]
        result.write_text(
            json.dumps({"seconds": seconds, "lengths": lengths, "peak_memory": memory, "figures": metrics})
        )


def stage_context(job: Job, folder: Path) -> StageContext:
    def artifact(path: str) -> Artifact:
        return Artifact("model", Path(path), "", {}, "", "", {})

    return StageContext(
        stage="ppo",
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        device=device_of(job.device),
        folder=folder,
        inputs={"sft": artifact(job.model), "reward/reward": artifact(job.reward)},
        tracker=NullTracker(),
        progress=Progress(folder, is_writer=False),
        local=job.processes == 1,
    )


def open_setup(config: RunConfig, context: StageContext, prompts: Sequence[Any]) -> Setup:
    """Models and rewards of the folders in `context`. All ranks must call it."""
    names = dict.fromkeys(config.ppo.reward_models.values())
    models = open_models(config, context, {name: context.inputs[f"reward/{name}"].path for name in names})
    return Setup(config, context, models, reward_set(config, models), prompts, held_out=[])


def prompts_of(job: Job, tokenizer: Any, prompts: Any, config: RunConfig, iteration: int) -> PromptBatch:
    """The job's prompts of an iteration, instead of those that the trainer would draw."""
    ids_B = torch.arange((iteration - 1) * config.ppo.batch_size, iteration * config.ppo.batch_size)
    tokens_BP, mask_BP = pad([job.prompts[number] for number in ids_B.tolist()], job.pad, left=True)
    return PromptBatch(tokens_BP, mask_BP, torch.zeros(len(ids_B), dtype=torch.bool), ids_B)


def load_dice(job: Job) -> None:
    """The sampler draws as usual, but gets the token of the job's response."""
    answers_BR, _ = pad(job.answers, job.pad)
    draw, pick = in_process.keyed_uniform, in_process.pick_token
    dictated: list[torch.Tensor] = []

    def keyed_uniform(seed: int, iteration: int, ids_G: torch.Tensor, t_G: torch.Tensor) -> torch.Tensor:
        dictated[:] = [answers_BR.to(ids_G.device)[ids_G, t_G]]
        return draw(seed, iteration, ids_G, t_G)

    def pick_token(probs_GV: torch.Tensor, uniform_G: torch.Tensor) -> torch.Tensor:
        pick(probs_GV, uniform_G)
        return dictated.pop()

    in_process.keyed_uniform, in_process.pick_token = keyed_uniform, pick_token


if __name__ == "__main__":
    main(Job.read(sys.argv[1]), Path(sys.argv[2]))
