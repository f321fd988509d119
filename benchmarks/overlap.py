"""Seconds of a PPO iteration with its parts in turn, with scoring beside sampling, and with sampling beside the update.

    python -m benchmarks.overlap --model FOLDER --threads 1 2
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.overlap --model FOLDER

The ways take turns on the same prompts, and the models learn at rate 0, so that all answers and all forward passes are the
same work. Without `--model` a random Llama is made; of its answers none ends itself. One process uses plain torch, more
of them ZeRO-3. Where there is a CUDA device it is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import turns
from benchmarks.our_side import stage_context
from benchmarks.side import Job
from rlhf import ranks
from rlhf.config import (
    DataConfig,
    HardwareConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RoleConfig,
    RunConfig,
    SamplingConfig,
    SourceConfig,
    TinyConfig,
)
from rlhf.data import load_prompts, short_prompts
from rlhf.ledger import PHASES, Clock
from rlhf.models.tiny import make_tiny
from rlhf.overlap import Ahead
from stages.ppo import Models, iterate, open_models

WAYS = ("in turn", "scoring beside sampling", "sampling beside the update")
STILL = OptimConfig(lr=0.0, weight_decay=0.0)
COLUMNS = ("sync", "sampling", "scoring", "update", "other")


def main() -> None:
    arguments = parse_arguments()
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(arguments, Path(folder))
        found = {threads: measure(arguments, config, threads) for threads in arguments.threads}
    if ranks.rank() == 0:
        print(table(found))
        settings = {name: value for name, value in vars(arguments).items() if name != "out"}
        report = {
            "settings": settings,
            "torch": torch.__version__,
            "device": turns.device_of("auto").type,
            "workers": ranks.world_size(),
        }
        arguments.out.write_text(json.dumps(report | {"seconds": found}, indent=1, default=str) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a Llama-like model; else one with random weights")
    parser.add_argument("--hidden", type=int, default=512, help="size of the random Llama")
    parser.add_argument("--layers", type=int, default=8, help="of the random Llama")
    parser.add_argument("--rows", type=int, default=32, help="answers per iteration on a worker")
    parser.add_argument("--slots", type=int, default=32, help="rows sampled together on a worker")
    parser.add_argument("--chunks", type=int, default=4, help="ppo.scoring_chunks")
    parser.add_argument("--tokens", type=int, default=2048, help="ppo.micro_batch_tokens")
    parser.add_argument("--max-prompt-length", type=int, default=160)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of a process; each is measured")
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations of each way, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two repeats: does it work?")
    parser.add_argument("--out", type=Path, default=Path("overlap.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(hidden=64, layers=2, max_new_tokens=16, repeats=2)
    return arguments


def make_config(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    role = RoleConfig(train=[SourceConfig(path="shipped")])
    workers = ranks.world_size()
    heads = max(arguments.hidden // 64, 1)
    tiny = TinyConfig(
        hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden, layers=arguments.layers, heads=heads
    )
    config = RunConfig(
        name="overlap",
        runs_dir=folder,
        model=ModelConfig(tiny=tiny),
        hardware=HardwareConfig(workers=workers, precision=arguments.precision),
        data=DataConfig(demonstrations=role, preferences=role, prompts=role, shared_prompts="drop"),
        reward=RewardConfig(models={"reward": RewardModelConfig(own_tag="helpful")}),
        ppo=PPOConfig(
            helpfulness_model="reward",
            safety_model="reward",
            iterations=arguments.repeats + 2,
            batch_size=arguments.rows * workers,
            minibatch_size=arguments.rows * workers,
            micro_batch_tokens=arguments.tokens,
            packing=True,
            max_prompt_length=arguments.max_prompt_length,
            sampling=SamplingConfig(max_new_tokens=arguments.max_new_tokens, batch_size=arguments.slots),
            optim=STILL,
            critic_optim=STILL,
            eval_every=arguments.repeats + 2,
        ),
    )
    path = arguments.model.absolute() if arguments.model else make_tiny(config)
    return config.model_copy(update={"model": ModelConfig(path=str(path))})


def measure(arguments: argparse.Namespace, config: RunConfig, threads: int) -> dict[str, list[dict[str, float]]]:
    """Figures of each timed iteration, by way."""
    torch.set_num_threads(threads)
    path, device = config.model.path, turns.device_of("auto").type
    job: Any = Job(path, path, {}, [], [], 0, 0, ranks.world_size(), threads, 0, device)
    context = stage_context(job, config.folder)
    models = open_models(config, context)
    prompts = short_prompts(models.tokenizer, load_prompts(config).train, config.ppo.max_prompt_length)
    ways = {way: (_as(way, config, arguments.chunks), dataclasses.replace(models, ahead=Ahead())) for way in WAYS}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for iteration in range(1, arguments.repeats + 2):
        for way, (settings, own) in ways.items():
            figures = once(settings, context, own, prompts, iteration)
            if iteration > 1:
                found[way].append(figures)
    return found


def once(config: RunConfig, context: Any, models: Models, prompts: Any, iteration: int) -> dict[str, float]:
    ranks.barrier()
    clock = Clock(context.device)
    figures = iterate(config, context, models, prompts, {"iteration": iteration, "beta": config.ppo.beta}, clock)
    return figures | clock.close()


def _as(way: str, config: RunConfig, chunks: int) -> RunConfig:
    ppo = config.ppo
    changed: dict[str, dict[str, Any]] = {
        WAYS[0]: {},
        WAYS[1]: {"scoring_chunks": chunks},
        WAYS[2]: {"sampling": ppo.sampling.model_copy(update={"ahead": True})},
    }
    return config.model_copy(update={"ppo": ppo.model_copy(update=changed[way])})


def table(found: dict[int, dict[str, list[dict[str, float]]]]) -> str:
    """Medians in seconds; the way's iterations over those in turn, as the median of the ratios of one turn each."""
    lines = []
    for threads, ways in found.items():
        for way, figures in ways.items():
            whole = [one["perf/seconds_iteration"] for one in figures]
            others = sum(
                statistics.median(one[f"perf/seconds_{p}"] for one in figures) for p in PHASES if p not in COLUMNS
            )
            cells = [statistics.median(one[f"perf/seconds_{phase}"] for one in figures) for phase in COLUMNS]
            cells[-1] += others
            in_turn = [one["perf/seconds_iteration"] for one in ways[WAYS[0]]]
            ratio = statistics.median(own / other for own, other in zip(whole, in_turn, strict=True))
            shown = [f"{cell:.2f}" for cell in [*cells, statistics.median(whole), ratio]]
            length = statistics.fmean(one["ppo/length"] for one in figures)
            lines.append([str(threads), way, *shown, f"{length:.1f}"])
    return turns.table(["threads", "way", *COLUMNS, "iteration", "of in turn", "tokens an answer"], lines)


if __name__ == "__main__":
    main()
