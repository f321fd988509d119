"""Seconds of an iteration or step, from arithmetic, bytes and the rates of the machine.

An upper bound in one respect: every prompt and every response is as long as the settings allow. Not counted: held-out
evaluations, checkpoints, data, user code. Communication and arithmetic follow each other. The fractions of the peak rate
that a phase reaches were measured on one H100 (benchmarks/RESULTS.md, "On a GPU").
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import PPOConfig, RunConfig, SupervisedConfig
from rlhf.planning.engines import FLOAT, MOMENTS, Layout, Model, layout_of
from rlhf.planning.machines import Machine
from rlhf.planning.phases import PPOPhases
from rlhf.planning.plan import StagePlan
from rlhf.planning.sampler import Sampler
from rlhf.planning.shapes import ModelShape
from rlhf.planning.supervised import TEXTS

REACHED = {"sampling": 0.40, "scoring": 0.41, "update": 0.35}  # of the roofline: sampling of 7B, the others of 1B
HOST_MEMORY_BANDWIDTH = 200e9  # of a node, for an optimizer in main memory


@dataclass(frozen=True)
class Cost:
    """Seconds of each phase of an iteration of PPO, or of a step of another stage."""

    stage: str
    unit: str  # iteration or step
    seconds: dict[str, float]
    count: int | None  # of iterations; None where it depends on the data
    gpus: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float | None:
        return None if self.count is None else self.count * self.total / 3600

    def dollars(self, price: float) -> float | None:
        """`price`: of a GPU for an hour."""
        return None if self.hours is None else self.hours * self.gpus * price


@dataclass(frozen=True)
class Rates:
    """What one worker reaches."""

    flops: float
    memory: float  # bytes/s
    link: float  # bytes/s of a collective of all workers
    near: float  # bytes/s between workers of a node
    host: float
    optimizer: float  # bytes/s of an optimizer in main memory

    @classmethod
    def of(cls, machine: Machine, workers: int, local: int) -> Rates:
        """`local`: workers of a node. Across nodes the network is the narrowest place."""
        link = (
            machine.link_bandwidth
            if workers <= local
            else min(machine.link_bandwidth, machine.network_bandwidth / local)
        )
        optimizer = HOST_MEMORY_BANDWIDTH / local
        return cls(
            machine.flops, machine.memory_bandwidth, link, machine.link_bandwidth, machine.host_bandwidth, optimizer
        )


def cost_of(config: RunConfig, shape: ModelShape, machine: Machine, plan: StagePlan) -> Cost | None:
    """None where the rates of the machine are unknown."""
    if not machine.flops:
        return None
    layout = layout_of(config.hardware, plan.workers)
    rates = Rates.of(machine, plan.workers, plan.local)
    gpus = plan.workers * config.hardware.gpus_per_worker
    if plan.stage == "ppo":
        gpus += config.ppo.sampling.workers * config.hardware.gpus_per_worker
        phases = PPOPhases(config, shape, layout, plan.local, machine.memory)
        seconds = _iteration(config.ppo, phases, rates, max(plan.rows or 1, 1))
        return Cost("ppo", "iteration", seconds, config.ppo.iterations, gpus)
    return Cost(plan.stage, "step", _step(plan.stage, config, shape, layout, rates), None, gpus)


def _iteration(ppo: PPOConfig, phases: PPOPhases, rates: Rates, rows: int) -> dict[str, float]:
    layout, P, R = phases.layout, phases.prompt, phases.response
    n, k = phases.rows_of_worker, layout.sequence_parallel  # k workers read k times as many rows, each a slice of them
    micro = max(phases.tokens // (P + R), 1)
    passes = -(-n * k // micro)
    scoring = sum(_pass(model, layout, rates, n, P + R, passes) for model in phases.models)
    minibatch = -(-ppo.minibatch_size // layout.workers)
    steps = ppo.epochs * (ppo.batch_size // ppo.minibatch_size)
    update = sum(
        steps * _learn(model, layout, rates, (minibatch, P + R), -(-minibatch * k // micro)) for model in phases.trained
    )
    policy = phases.trained[0]
    sync = policy.trained * FLOAT / rates.link if layout.gathers else policy.trained * FLOAT / rates.memory
    return {
        "sync": sync,
        "sampling": _sample(phases.sampler, rates, (phases.rows_of_sampler, rows), (P, R)),
        "scoring": scoring,
        "update": update,
    }


def _sample(sampler: Sampler, rates: Rates, rows: tuple[int, int], lengths: tuple[int, int]) -> float:
    """`rows`: of a worker, and of an engine at once. Prompts are arithmetic; a step reads all weights and the keys and
    values. Workers that share an engine divide all of this, and add up what every layer gives twice."""
    k, shape, b = sampler.workers, sampler.shape, sampler.layout.number
    (own, slots), (P, R) = rows, lengths
    n = own * k
    slots = min(n, slots)
    weights = shape.backbone_products + shape.table
    prompts = n * (2 * shape.backbone_products * P + _attention(shape, P)) / rates.flops / k
    each = max(2 * weights * slots / rates.flops, weights * b / rates.memory) / k
    reading = slots * (P + R / 2) * shape.cached_numbers * b / min(k, shape.kv_heads) / rates.memory
    summed = 2 * shape.layers * shape.hidden * b * n * (P + R) * 2 * (k - 1) / k / rates.near
    return prompts / REACHED["scoring"] + -(-n * R // slots) * (each + reading) / REACHED["sampling"] + summed


def _forward(model: Model, rows: int, length: int) -> float:
    """FLOPs of one pass."""
    return rows * (2 * model.products * length + _attention(model.shape, length))


def _attention(shape: ModelShape, length: int) -> float:
    """Four for each number of a query and a key before it."""
    return 4 * shape.layers * shape.query * length**2 / 2


def _moved(model: Model, layout: Layout, rates: Rates) -> float:
    """Seconds to gather all weights once."""
    if not layout.gathers:
        return 0.0
    whole = model.weight_bytes(layout)
    from_host = whole / layout.workers / rates.host if layout.offload else 0.0
    return from_host + (whole / rates.link if layout.workers > 1 else 0.0)


def _exchanged(model: Model, layout: Layout, rates: Rates, tokens: int) -> float:
    """Seconds in which workers that share sequences exchange queries, keys, values and results, once in every layer."""
    shape, k = model.shape, layout.sequence_parallel
    return tokens * shape.layers * 2 * (shape.query + shape.kv) * layout.number * (k - 1) / k / rates.near


def _pass(model: Model, layout: Layout, rates: Rates, rows: int, length: int, passes: int) -> float:
    arithmetic = _forward(model, rows, length) / rates.flops / REACHED["scoring"]
    return arithmetic + passes * _moved(model, layout, rates) + _exchanged(model, layout, rates, rows * length)


def _learn(model: Model, layout: Layout, rates: Rates, batch: tuple[int, int], passes: int) -> float:
    """One optimizer step. Weights are gathered for both passes, gradients reduced once a micro-batch. Recomputation is
    part of the fraction that is reached. With an adapter the gradient of the base is not computed."""
    rows, length = batch
    backward = 1 if model.adapted else 2
    arithmetic = (1 + backward) * _forward(model, rows, length) / rates.flops / REACHED["update"]
    reduced = model.trained * FLOAT / rates.link if layout.workers > 1 else 0.0
    states = model.trained / layout.workers * (2 * FLOAT + MOMENTS) * 2
    stepping = states / (rates.optimizer if layout.offload else rates.memory)
    exchanged = 2 * _exchanged(model, layout, rates, rows * length)
    return arithmetic + passes * (2 * _moved(model, layout, rates) + reduced) + exchanged + stepping


def _step(stage: str, config: RunConfig, shape: ModelShape, layout: Layout, rates: Rates) -> dict[str, float]:
    own: SupervisedConfig = getattr(config, stage)
    model = Model(stage, shape, scalar=stage == "reward", learns=True, lora=config.model.lora)
    passes = own.batch_size // layout.groups // own.micro_batch_size
    texts = -(-TEXTS[stage] * own.batch_size // layout.workers)  # of k rows a worker reads k parts
    seconds = {"update": _learn(model, layout, rates, (texts, own.max_length), passes)}
    if stage == "dpo":
        seconds["reference"] = _pass(Model("reference", shape), layout, rates, texts, own.max_length, passes)
    return seconds
