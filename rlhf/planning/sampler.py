"""What a worker holds of the sampler: in process a whole copy that stays, with vLLM a part of one that sleeps in main
memory while the worker does something else."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import LoraConfig, SamplingConfig
from rlhf.planning.engines import Layout, Part
from rlhf.planning.shapes import ModelShape

# Of free memory, for keys and values.
IN_PROCESS, IN_BACKGROUND = 0.8, 0.4  # rlhf.generation.in_process
VLLM = 0.25  # rlhf.generation.vllm


@dataclass(frozen=True)
class Sampler:
    shape: ModelShape
    layout: Layout
    settings: SamplingConfig
    lora: LoraConfig | None

    @property
    def workers(self) -> int:
        """Those that share an engine."""
        return self.settings.tensor_parallel

    @property
    def elsewhere(self) -> bool:
        """On devices of its own."""
        return self.settings.workers > 0

    @property
    def sleeps(self) -> bool:
        return self.settings.engine == "vllm" and not self.layout.cpu and not self.elsewhere

    @property
    def fraction(self) -> float:
        """Of free memory, that the cache takes."""
        if self.settings.engine == "vllm":
            return VLLM
        return IN_BACKGROUND if self.settings.one_step_off_policy else IN_PROCESS

    def weights(self) -> list[Part]:
        adapter = 0 if self.lora is None else self.shape.adapter(self.lora)
        bytes_ = (self.shape.parameters + adapter) * self.layout.number / self.workers
        return [Part("sampler", "weights", bytes_)]

    def resting(self) -> list[Part]:
        """On the device, while nothing is sampled."""
        return [] if self.sleeps or self.elsewhere else self.weights()

    def asleep(self) -> list[Part]:
        """In main memory."""
        return self.weights() if self.sleeps else []

    def packed(self) -> float:
        """Copies of weights while sampling: on a GPU query, key and value as one; on a CPU all in oneDNN's layout."""
        if self.lora is not None or (self.settings.engine == "vllm" and not self.layout.cpu):
            return 0.0
        shape, b = self.shape, self.layout.number
        if self.layout.cpu:
            return (shape.backbone_products + shape.table) * b / self.workers
        return shape.layers * shape.hidden * (shape.query + 2 * shape.kv) * b

    def cache(self, rows: int, length: int) -> float:
        """Keys and values of so many rows of the engine; in process one tensor more, because the cache moves tensor by
        tensor. Workers divide the heads of keys, as far as there are so many."""
        more = 0 if self.settings.engine == "vllm" else 1 / (2 * self.shape.layers)
        numbers = self.shape.cached_numbers * (1 + more)
        return rows * length * numbers * self.layout.number / min(self.workers, self.shape.kv_heads)
