"""TRL's side of `benchmarks.ppo_vs_trl`: `python -m benchmarks.trl_side JOB RESULT`, alone or as a rank of torchrun.

Runs in the environment of TRL 1.12 and needs nothing of ours. Common settings are equal: one optimizer step per epoch
over the whole batch, AdamW without weight decay or clipping at a constant rate, no gradient checkpointing.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

from benchmarks.side import Job, peak_memory
from benchmarks.trl_record import loaded_dice


def main(job: Job, result: Path) -> None:
    torch.set_num_threads(job.threads)
    torch.backends.cuda.enable_cudnn_sdp(False)  # slow for rows of ever other lengths; ours does without it too
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, folder)
        ends: list[float] = []
        lengths: list[float] = []
        metrics: list[dict[str, float]] = []

        def on_log(logged: dict[str, float]) -> None:  # once an iteration
            ends.append(time.perf_counter())
            real_BR = ~sys._getframe(1).f_locals["padding_mask"]
            lengths.append(float(trainer.accelerator.gather(real_BR.sum(1).float()).mean()))
            metrics.append(logged)

        trainer.log = on_log
        trainer.accelerator.wait_for_everyone()
        start = time.perf_counter()
        with rollouts_in_bf16(job), dictated(job, trainer.accelerator.process_index) if job.answers else nullcontext():
            trainer.train()
    seconds = [end - begin for begin, end in itertools.pairwise([start, *ends])]
    memory = torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_memory()
    memory = int(trainer.accelerator.gather(torch.tensor([memory])).sum())
    if trainer.accelerator.is_main_process:
        result.write_text(
            json.dumps({"seconds": seconds, "lengths": lengths, "peak_memory": memory, "figures": metrics})
        )


def rollouts_in_bf16(job: Job) -> AbstractContextManager[Any]:
    """In a bf16 job, autocasts sampling and scoring too; TRL's `bf16` covers its update only."""
    patches = ExitStack()
    if job.config["hardware"]["precision"] == "bf16" and not job.stock_trl:
        for name in ("batch_generation", "forward", "get_reward"):
            autocast = torch.autocast(job.device, torch.bfloat16)
            patches.enter_context(patch.object(ppo_trainer, name, autocast(getattr(ppo_trainer, name))))
    return patches


def dictated(job: Job, rank: int) -> AbstractContextManager[Any]:
    """Sampling draws as usual, but gets the tokens of the job's responses to its prompts."""
    generate, ppo = ppo_trainer.batch_generation, job.config["ppo"]
    count, R = ppo["batch_size"] // job.processes, ppo["sampling"]["max_new_tokens"]
    starts = itertools.count(rank * count, ppo["batch_size"])

    def generation(*args: Any) -> Any:
        start = next(starts)
        answers = [[*row, *[job.pad] * (R - len(row))] for row in job.answers[start : start + count]]
        with loaded_dice(answers):
            return generate(*args)

    return patch.object(ppo_trainer, "batch_generation", generation)


def make_trainer(job: Job, folder: str) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token_id, tokenizer.padding_side = job.pad, "left"
    policy = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    policy.generation_config.pad_token_id = job.pad
    settings = trl_settings(job, folder)

    def scalar() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(job.reward, num_labels=1, dtype=torch.float32)

    prompts = Dataset.from_dict({"input_ids": job.prompts})
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=prompts,
    )
    rows: Any = prompts
    in_order = DataLoader(rows, batch_size=settings.local_rollout_forward_batch_size, collate_fn=trainer.data_collator)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    return trainer


def trl_settings(job: Job, folder: str) -> PPOConfig:
    ppo, optim = job.config["ppo"], job.config["ppo"]["optim"]
    local_rows = ppo["batch_size"] // job.processes
    return PPOConfig(
        output_dir=folder,
        total_episodes=ppo["batch_size"] * job.iterations,
        num_ppo_epochs=ppo["epochs"],
        per_device_train_batch_size=ppo["micro_batch_size"],
        gradient_accumulation_steps=local_rows // ppo["micro_batch_size"],
        local_rollout_forward_batch_size=local_rows,
        response_length=ppo["sampling"]["max_new_tokens"],
        temperature=ppo["sampling"]["temperature"],
        stop_token=None if job.eos is None else "eos",
        kl_coef=ppo["kl_coef"],
        gamma=ppo["gamma"],
        gae_lambda=ppo["gae_lambda"],
        cliprange=ppo["clip_range"],
        cliprange_value=ppo["value_clip_range"],
        vf_coef=1.0,  # our critic has an optimizer of its own
        learning_rate=optim["lr"],
        lr_scheduler_type="constant",
        adam_beta1=optim["beta1"],
        adam_beta2=optim["beta2"],
        adam_epsilon=optim["eps"],
        weight_decay=0.0,
        bf16=job.config["hardware"]["precision"] == "bf16",
        use_cpu=job.device == "cpu",
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(Job.read(sys.argv[1]), Path(sys.argv[2]))
