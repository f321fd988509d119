"""PPO's models on one worker or on several, for benchmarks of its parts.

One worker is this process, with plain torch; more are processes under torchrun, with ZeRO-3.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from benchmarks.our_side import open_setup, stage_context
from benchmarks.shapes import given_or_random
from benchmarks.side import NEVER, Job
from benchmarks.turns import device_of, settings
from rlhf.config import HardwareConfig, PPOConfig, RunConfig, SamplingConfig
from rlhf.data import load_prompts, short_prompts
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.ppo.setup import Setup
from rlhf.ppo.trainer import PPOTrainer

ROOT = Path(__file__).parent.parent


def measured(module: str, config: RunConfig, device: str, threads: int, repeats: int) -> Any:
    """What `module.measure(setup, repeats)` returns on the first of `config.hardware.workers` ranks."""
    workers, folder = config.hardware.workers, config.folder
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        model=config.model.path,
        reward=config.model.path,
        config=config.model_dump(mode="json"),
        prompts=[],
        answers=[],
        pad=0,
        eos=None,
        processes=workers,
        threads=max(threads // workers, 1),
        iterations=repeats,
        device=device_of(device).type,
    )
    if workers == 1:
        return import_module(module).measure(_open(job, folder), repeats)
    job_file, result, log = (folder / f"{workers}-{name}" for name in ("job.json", "result.json", "log"))
    job.write(job_file)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(workers), "-m", "benchmarks.worker_group", module, str(job_file), str(result)]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    own |= {} if job.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        subprocess.run(command, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT, check=False)
    if not result.is_file():
        raise UserError(f"{workers} workers did not finish:\n{log.read_text()[-4000:]}", 5)
    return json.loads(result.read_text())


def add_sizes(parser: argparse.ArgumentParser, rows: int, length: int) -> None:
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=rows, help=f"answers of an iteration (default {rows})")
    parser.add_argument("--length", type=int, default=length, help=f"tokens of its answers (default {length})")
    parser.add_argument("--max-prompt-length", type=int, default=64)


def by_workers(module: str, args: argparse.Namespace, micro_batch: int) -> Iterator[tuple[int, Any]]:
    """(workers, what was `measured`) for each number of workers; an iteration is one minibatch of `args.rows`
    responses."""
    ppo = PPOConfig(
        batch_size=args.rows,
        minibatch_size=args.rows,
        micro_batch_size=micro_batch,
        max_prompt_length=args.max_prompt_length,
        sampling=SamplingConfig(max_new_tokens=args.length, batch_size=args.rows),
        logged_samples=1,
    )
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = given_or_random(args.model, "tiny" if args.quick else args.shape, Path(folder))
        possible = possible_workers(args.workers, args.device)
        for workers in args.workers:
            if workers not in possible:
                print(f"left out: {workers} workers, on {torch.cuda.device_count()} CUDA devices", flush=True)
        for workers in possible:
            hardware = HardwareConfig(precision=args.precision, workers=workers)
            config = settings(args, model, Path(folder), 512, ppo=ppo, hardware=hardware)
            yield workers, measured(module, config, args.device, args.threads, args.repeats)


def possible_workers(asked: Sequence[int], device: str) -> list[int]:
    """Those of `asked` that find a device each."""
    cuda = device_of(device).type == "cuda"
    return [count for count in asked if not cuda or count <= torch.cuda.device_count()]


def one_iteration(trainer: PPOTrainer) -> dict[str, float]:
    """The metrics of the next iteration and its times, which begin when all ranks are there."""
    collectives.barrier()
    trainer.timer.restart()
    trainer.state.iteration += 1
    return trainer.step() | trainer.timer.close()


def _open(job: Job, folder: Path) -> Setup:
    """With models of one folder: speed does not ask what a reward model learned."""
    torch.set_num_threads(job.threads)
    config = RunConfig.model_validate(job.config)
    setup = open_setup(config, stage_context(job, folder), prompts=[])
    cast(Any, setup.models.sampler).stop_ids = [NEVER]  # every response is as long as asked for
    prompts = short_prompts(setup.models.tokenizer, load_prompts(config).train, 10**9)
    return dataclasses.replace(setup, prompts=prompts)


def main(module: str, job: Job, result: Path) -> None:
    """One rank of torchrun."""
    cuda = job.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    measure: Callable[[Setup, int], Any] = import_module(module).measure
    setup = _open(job, result.parent)
    found = measure(setup, job.iterations)
    if setup.context.is_writer:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Job.read(sys.argv[2]), Path(sys.argv[3]))
