"""The nearest change of settings with which a run fits: the one that costs least time or quality, or a few together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from rlhf.config import LoraConfig, RunConfig
from rlhf.planning.machines import Machine
from rlhf.planning.plan import RunPlan, plan_run
from rlhf.planning.shapes import ModelShape

MOST_TOGETHER = 4


@dataclass(frozen=True)
class Change:
    """Settings by their dotted names."""

    settings: dict[str, Any]

    @property
    def line(self) -> str:
        """As it is given after RUNFILE."""
        return " ".join(f"--{_shown(name, value)}" for name, value in self.settings.items())

    def on(self, config: RunConfig) -> RunConfig:
        for name, value in self.settings.items():
            config = _with(config, name.split("."), value)
        return config


def nearest_change(config: RunConfig, shape: ModelShape, machine: Machine) -> Change | None:
    """None if no change of these fits: then it needs more or larger machines, or a smaller model."""
    plan = plan_run(config, shape, machine)
    groups = [*_micro_batches(config, plan), *_others(config), *_shared_samplers(config, shape, machine)]
    groups += _shared_sequences(config, shape, machine)
    for count in range(1, min(MOST_TOGETHER, len(groups)) + 1):
        for chosen in combinations(groups, count):
            for settings in product(*chosen):
                change = Change({name: value for one in settings for name, value in one.items()})
                if plan_run(change.on(config), shape, machine).fits:
                    return change
    return None


def _micro_batches(config: RunConfig, plan: RunPlan) -> Iterator[list[dict[str, Any]]]:
    """Smaller micro-batches of each stage that does not fit, largest first. They change speed alone."""
    for stage in dict.fromkeys(excess.stage for excess in plan.excesses):
        own, key = getattr(config, stage), f"{stage}.micro_batch_size"
        if stage == "ppo" and own.micro_batch_tokens is not None:
            row = own.max_prompt_length + own.sampling.max_new_tokens
            key, now, least = "ppo.micro_batch_tokens", own.micro_batch_tokens, row
        else:
            now, least = own.micro_batch_size, 1
        sizes = []
        while now > least:
            now = max(now // 2, least)
            sizes.append({key: now})
        if sizes:
            yield sizes


def _others(config: RunConfig) -> Iterator[list[dict[str, Any]]]:
    """Recomputation and shards change speed alone, bf16 also rounding; offloading is slow; an adapter learns less."""
    hardware, gpus = config.hardware, config.hardware.gpus_per_worker > 0
    if not config.model.gradient_checkpointing:
        yield [{"model.gradient_checkpointing": True}]
    if hardware.zero_stage < 3 and hardware.workers > 1:
        yield [{"hardware.zero_stage": 3}]
    if gpus and hardware.precision == "float32":
        yield [{"hardware.precision": "bf16"}]
    if gpus and not hardware.offload_to_cpu:
        yield [{"hardware.offload_to_cpu": True}]
    if config.model.lora is None and config.ppo.sampling.engine == "inprocess":
        yield [{"model.lora": LoraConfig()}]


def _shared_samplers(config: RunConfig, shape: ModelShape, machine: Machine) -> Iterator[list[dict[str, Any]]]:
    """vLLM, with an engine for 2, 4 or 8 workers of a node."""
    hardware, sampling = config.hardware, config.ppo.sampling
    if not hardware.gpus_per_worker or config.model.lora is not None or sampling.one_step_off_policy:
        return
    engine = {} if sampling.engine == "vllm" else {"ppo.sampling.engine": "vllm"}
    on_node = machine.workers(hardware, hardware.workers)
    numbers = [k for k in (2, 4, 8) if k > sampling.tensor_parallel and on_node % k == shape.heads % k == 0]
    if numbers:
        yield [engine | {"ppo.sampling.tensor_parallel": k} for k in numbers]


def _shared_sequences(config: RunConfig, shape: ModelShape, machine: Machine) -> Iterator[list[dict[str, Any]]]:
    """Every sequence on 2, 4 or 8 workers of a node."""
    hardware, every = config.hardware, (config.hardware.workers, config.reward_workers)
    if not hardware.gpus_per_worker or "dpo" in config.pipeline or config.model.attention != "sdpa":
        return
    counts = (*every, machine.workers(hardware, hardware.workers), shape.heads)
    numbers = [k for k in (2, 4, 8) if k > hardware.sequence_parallel and all(count % k == 0 for count in counts)]
    if numbers:
        yield [{"hardware.sequence_parallel": k} for k in numbers]


def _with(settings: Any, keys: list[str], value: Any) -> Any:
    """A copy of `settings` with another value at `keys`."""
    key, *rest = keys
    return settings.model_copy(update={key: _with(getattr(settings, key), rest, value) if rest else value})


def _shown(name: str, value: Any) -> str:
    if isinstance(value, LoraConfig):
        return f"{name}.rank {value.rank}"
    return f"{name} {str(value).lower() if isinstance(value, bool) else value}"
