"""The cost model of `rlhf plan` beside iterations of PPO that others have published: `python -m benchmarks.growth`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launch.plan import tables
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.planning import cost_of, machine_named, plan_run, shape_of

# The source names 1,024 prompts and one epoch, no lengths; 1,024 tokens for each are those of its example scripts.
SETTINGS: dict[str, Any] = {
    "ppo.batch_size": 1024,
    "ppo.minibatch_size": 128,
    "ppo.max_prompt_length": 1024,
    "ppo.sampling.max_new_tokens": 1024,
    "hardware.offload_to_cpu": "true",
    "reward.micro_batch_size": 1,
    "ppo.sampling.engine": "vllm",
}


HOST_MEMORY = 2e12  # bytes of a node; the source does not say


@dataclass(frozen=True)
class Published:
    """Seconds for 1,024 prompts on A800-80G GPUs (OpenRLHF's README, "Performance").

    DeepSpeed-Chat: all models on all GPUs, as here. OpenRLHF: a group of GPUs for each model and for its samplers.
    """

    model: str
    gpus: int
    tensor_parallel: int  # of our sampler; 70B needs it, and OpenRLHF's had 4
    deepspeed_chat: float
    openrlhf: float


PUBLISHED = (
    Published("llama-2-7b", 16, 1, 855.09, 471.11),
    Published("llama-2-13b", 32, 1, 1528.93, 608.93),
    Published("llama-2-70b", 32, 8, 10407.0, 4488.53),
)


def settings_of(published: Published) -> RunConfig:
    own = {"model": published.model, "hardware": "cluster-64"} | SETTINGS
    own |= {"hardware.workers": published.gpus, "hardware.workers_per_reward_model": published.gpus // 2}
    own |= {"ppo.sampling.tensor_parallel": published.tensor_parallel}
    return load("llama2-chat", [word for name, value in own.items() for word in (f"--{name}", str(value))])


def predicted(published: Published) -> float | None:
    """Seconds by the cost model; None where the run does not fit."""
    config, machine = settings_of(published), replace(machine_named("a100-80g"), host_memory=HOST_MEMORY)
    shape = shape_of(config.model)
    assert shape is not None
    plan = plan_run(config, shape, machine)
    cost = cost_of(config, shape, machine, plan.of("ppo"))
    return cost.total if cost and plan.fits else None


def rows() -> Iterator[list[str]]:
    for row in PUBLISHED:
        ours = predicted(row)
        ratios = ["", ""] if ours is None else [f"{ours / each:.2f}" for each in (row.deepspeed_chat, row.openrlhf)]
        others = [f"{row.deepspeed_chat:,.0f}", f"{row.openrlhf:,.0f}"]
        yield [row.model, str(row.gpus), "does not fit" if ours is None else f"{ours:,.0f}", *others, *ratios]


def main() -> None:
    head = ["model", "GPUs", "rlhf plan", "DeepSpeed-Chat", "OpenRLHF", "plan : DeepSpeed-Chat", "plan : OpenRLHF"]
    print(tables.aligned(head, list(rows())))


if __name__ == "__main__":
    main()
