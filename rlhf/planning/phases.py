"""What a worker's device and its host hold in each phase of PPO, by role and kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlhf.config import RunConfig
from rlhf.planning import activations
from rlhf.planning.engines import FLOAT, GATHER_BYTES, MAX_LIVE, Layout, Model, Part, gathered, offloaded, resting
from rlhf.planning.sampler import Sampler
from rlhf.planning.shapes import ModelShape

CONTEXT_BYTES = 1.5e9  # CUDA, NCCL and loaded kernels on a GPU
PROCESS_BYTES = {True: 0.6e9, False: 4e9}  # Python and its libraries in main memory, without and with CUDA
FRAGMENTATION = 0.05  # of everything else, because free memory comes in pieces
FILE_BYTES = 2e9  # of a weights file: rlhf.models.saving.FILE_BYTES


@dataclass(frozen=True)
class Phase:
    """`device`: of one worker. `host`: of all workers of a node, in its main memory."""

    name: str
    device: tuple[Part, ...]
    host: tuple[Part, ...]

    @property
    def device_bytes(self) -> float:
        return sum(part.bytes for part in self.device)

    @property
    def host_bytes(self) -> float:
        return sum(part.bytes for part in self.host)


def with_allowance(device: Iterable[Part], layout: Layout) -> tuple[Part, ...]:
    """The parts, what a GPU needs beside them, and what fragmentation takes."""
    parts = [part for part in device if part.bytes]
    if layout.cpu:
        return tuple(parts)
    parts.append(Part("worker", "context", CONTEXT_BYTES))
    return (*parts, Part("worker", "fragmentation", FRAGMENTATION * sum(part.bytes for part in parts)))


def host_of(layout: Layout, local: int, models: Sequence[Model], *more: Part) -> tuple[Part, ...]:
    """`local`: workers of the node."""
    shards = [Part(part.role, part.kind, local * part.bytes) for model in models for part in offloaded(model, layout)]
    process = Part("worker", "process", local * PROCESS_BYTES[layout.cpu])
    return (process, *shards, *(part for part in more if part.bytes))


def save_parts(model: Model, layout: Layout, local: int) -> tuple[list[Part], list[Part]]:
    """(device, host of a node with `local` workers): weights are gathered in buckets, and files are dealt out to the
    workers, each of which fills one while it writes another.

    An adapted model's are there as they are and once more with the adapter merged. safetensors copies what it writes."""
    weights = model.weight_bytes(layout)
    bucket = min(GATHER_BYTES + model.shape.largest * FLOAT, weights)
    device = [Part(model.role, "bucket of gathered weights", bucket if layout.gathers else 0)]
    files = math.ceil(weights / FILE_BYTES)
    at_once = min(2 * local, math.ceil(files / layout.workers) * local, files)
    merged = model.base * FLOAT / files if model.adapted else 0
    writers = min(local, files)
    host = [
        Part(model.role, "files of weights", at_once * weights / files + writers * merged),
        Part(model.role, "file", writers * min(FILE_BYTES, model.base * FLOAT)),
    ]
    return device, host


def step_bytes(model: Model, layout: Layout) -> float:
    """Beside the gradients that rest: in the backward pass two whole gradients of the largest weight, in the optimizer's
    step a flat copy of up to `MAX_LIVE` of the worker's; without shards the gradients themselves."""
    if layout.local:
        return model.trained * FLOAT
    copy = 0 if layout.offload else min(MAX_LIVE, model.trained / layout.workers) * FLOAT
    largest = model.shape.largest if not model.adapted else 0
    return max(2 * FLOAT * largest, copy)


class PPOPhases:
    """The phases of a PPO stage. `free`: bytes of the device, for as many rows of the sampler as fit."""

    def __init__(self, config: RunConfig, shape: ModelShape, layout: Layout, local: int, free: float) -> None:
        self.config, self.shape, self.layout, self.local, self.free = config, shape, layout, local, free
        lora, ppo = config.model.lora, config.ppo
        critic = [Model("critic", shape, scalar=True, learns=True, lora=lora)] if ppo.advantage == "gae" else []
        rewards = [Model(f"reward/{name}", shape, scalar=True) for name in dict.fromkeys(ppo.reward_models.values())]
        self.trained = [Model("policy", shape, learns=True, lora=lora), *critic]
        self.frozen = [Model("reference", shape), *rewards]
        self.models = [*self.trained, *self.frozen]
        self.sampler = Sampler(shape, layout, ppo.sampling, lora)
        self.prompt, self.response = ppo.max_prompt_length, ppo.sampling.max_new_tokens

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch: all rows at the limits of their lengths."""
        ppo, row = self.config.ppo, self.prompt + self.response
        return ppo.micro_batch_size * row if ppo.micro_batch_tokens is None else max(ppo.micro_batch_tokens, row)

    @property
    def read(self) -> int:
        """Of them, those of one worker."""
        return self.layout.slice(self.tokens)

    @property
    def predicted(self) -> int:
        """Tokens of responses, which may all be in the slice of one worker."""
        return min(round(self.tokens * self.response / (self.prompt + self.response)), self.read)

    def rest(self) -> list[Part]:
        return [*(part for model in self.models for part in resting(model, self.layout)), *self.sampler.resting()]

    def awake(self) -> list[Part]:
        """What rests, and a sampler that sleeps otherwise."""
        return [*self.rest(), *self.sampler.asleep()]

    def rows(self) -> int:
        """Rows that an engine samples together; 0 if not even one fits."""
        sampler, workers = self.sampler, self.sampler.workers
        context = 0.0 if self.layout.cpu else CONTEXT_BYTES
        held = sampler.weights() if sampler.elsewhere else self.awake()
        free = self.free - context - sampler.packed() - _total(held)
        fitting = int(sampler.fraction * free // sampler.cache(1, self.prompt + self.response))
        return max(0, min(fitting, workers * self.config.ppo.sampling.batch_size, workers * self.rows_of_sampler))

    @property
    def rows_of_worker(self) -> int:
        return -(-self.config.ppo.batch_size // self.layout.workers)

    @property
    def rows_of_sampler(self) -> int:
        return -(-self.config.ppo.batch_size // (self.config.ppo.sampling.workers or self.layout.workers))

    def sampling(self) -> list[Part]:
        """Where samplers are elsewhere, of the device that holds more: a worker's, or that of a sampler."""
        rows, length, sampler = max(self.rows(), 1), self.prompt + self.response, self.sampler
        passing, drawn = activations.sampling(self.shape, self.layout, rows, self.prompt, length)
        kinds = {
            "packed weights": sampler.packed(),
            "KV cache": sampler.cache(rows, length),
            "activations": passing,
            "logits": drawn,
        }
        own = [Part("sampler", kind, bytes) for kind, bytes in kinds.items()]
        if sampler.elsewhere:
            return max(self.rest(), [*sampler.weights(), *own], key=_total)
        return [*self.awake(), *own]

    def scoring(self) -> list[Part]:
        return [*self.rest(), *self._worst(self.models, self._reads)]

    def _reads(self, model: Model) -> list[Part]:
        head = 0.0 if model.scalar else activations.logits(self.shape, self.layout, self.predicted, backward=False)
        cast = activations.casts(self.shape, self.layout, model.products, recompute=True) if model.learns else 0.0
        return [
            Part(model.role, "gathered weights", gathered(model, self.layout, backward=False)),
            Part(model.role, "casts of weights", cast),
            Part(model.role, "activations", activations.passing(self.shape, self.layout, self.read)),
            Part(model.role, "logits", head),
        ]

    def update(self) -> list[Part]:
        together = self.config.ppo.sampling.one_step_off_policy and not self.sampler.elsewhere
        background = self.sampling()[len(self.awake()) :] if together else []
        return [*self.rest(), *background, *self._worst(self.trained, self._learns)]

    def _learns(self, model: Model) -> list[Part]:
        return training_parts(model, self.layout, self.read, self.predicted, self.config.model.gradient_checkpointing)

    def opening(self) -> list[Part]:
        """Trained models are sharded in float32 before their optimizer exists. The largest weight is whole while it is
        read, and each optimizer begins with a buffer of zero gradients."""
        first = (
            0.0
            if self.layout.local or self.layout.offload
            else max(model.trained / self.layout.shards * FLOAT for model in self.trained)
        )
        reading = self.shape.largest * FLOAT if self.layout.gathers else 0
        later = {
            "small weights, whole",
            "optimizer" if self.layout.local else "",
        }  # plain torch makes it at its first step
        kept = [part for part in self.awake() if part.kind not in later]
        return [*kept, Part("worker", "first gradients", first), Part("worker", "weight in reading", reading)]

    def saving(self) -> tuple[list[Part], list[Part]]:
        device, host = [], []
        for model in self.trained:
            parts = save_parts(model, self.layout, self.local)
            device, host = (max(a, b, key=_total) for a, b in zip((device, host), parts, strict=True))
        return [*self.rest(), *device], host

    def _worst(self, models: Sequence[Model], parts: Callable[[Model], list[Part]]) -> list[Part]:
        """Models take turns: the parts of the one that needs most."""
        return max((parts(model) for model in models), key=_total)

    def all(self) -> list[Phase]:
        saved, written = self.saving()
        reading = [Part("sampler", "weight in reading", self.shape.largest * FLOAT * self.local)]
        defragmented = (
            0.0
            if self.layout.local or not self.layout.sharded
            else max(model.trained / self.layout.workers * FLOAT for model in self.trained)
        )
        opened = [*reading, Part("worker", "shards in order", self.local * defragmented)]
        layout = self.layout
        asleep = [Part(part.role, part.kind, self.local * part.bytes) for part in self.sampler.asleep()]

        def host(*more: Part) -> tuple[Part, ...]:
            return host_of(layout, self.local, self.models, *asleep, *more)

        return [
            Phase("opening", with_allowance(self.opening(), layout), host(*opened)),
            Phase("sampling", with_allowance(self.sampling(), layout), host()),
            Phase("scoring", with_allowance(self.scoring(), layout), host()),
            Phase("update", with_allowance(self.update(), layout), host()),
            Phase("saving", with_allowance(saved, layout), host(*written)),
            Phase("finishing", with_allowance(self.sampling(), layout), host(*reading)),
        ]


def training_parts(model: Model, layout: Layout, tokens: int, predicted: int, recompute: bool) -> list[Part]:
    """Beside what rests, in the backward pass and the step of one model."""
    head = 0.0 if model.scalar else activations.logits(model.shape, layout, predicted, backward=True)
    kinds = {
        "gathered weights": gathered(model, layout, backward=True),
        "casts of weights": activations.casts(model.shape, layout, model.products, recompute),
        "gradients in passing": step_bytes(model, layout),
        "activations": activations.training(model.shape, layout, tokens, recompute),
        "logits": head,
    }
    return [Part(model.role, kind, bytes) for kind, bytes in kinds.items()]


def _total(parts: Iterable[Part]) -> float:
    return sum(part.bytes for part in parts)
