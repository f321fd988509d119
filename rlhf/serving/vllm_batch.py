"""The rows of an engine, as `Batch`, sampled by vLLM."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rlhf.generation.vllm import CACHE_FRACTION, Capacity
from rlhf.generation.vllm_steps import Sampled, VLLMSteps
from rlhf.models import load_config, positions
from rlhf.profiling.memory import free_bytes
from rlhf.profiling.roofline import size_of
from rlhf.serving.batch import MOST_ROWS, Room, context_for
from rlhf.serving.rows import Piece, Row, TokenLogprob


class VLLMModel:
    """A model in vLLM. One batch at a time samples with it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """UserError (4, 5) for a folder without a causal model, and where memory holds hardly any keys and values."""
        self._folder, self._device = folder, device
        config = load_config(folder)
        with torch.device("meta"):
            self._of_token = size_of(AutoModelForCausalLM.from_config(config)).cache_bytes
        tokens = int(CACHE_FRACTION * free_bytes(device) // self._of_token)
        self.room = Room(tokens, context_for(tokens, positions(config)))
        self._steps: VLLMSteps | None = self._open()

    def batch(self) -> VLLMBatch:
        """After a failure with vLLM started anew."""
        if self._steps is None:
            self._steps = self._open()
        steps, self._steps = self._steps, None
        return VLLMBatch(steps)

    def _open(self) -> VLLMSteps:
        capacity = Capacity(MOST_ROWS, self.room.context)
        return VLLMSteps(self._folder, self._of_token, self._device, capacity)


class VLLMBatch:
    def __init__(self, steps: VLLMSteps) -> None:
        self._steps = steps
        weakref.finalize(self, steps.close).atexit = False
        self._named: dict[str, Row] = {}
        self._count = 0

    @property
    def rows(self) -> list[Row]:
        return list(self._named.values())

    @property
    def free(self) -> int:
        return MOST_ROWS - len(self._named)

    def next_group(self, waiting: Sequence[Row]) -> int:
        """As many as have a slot: vLLM finds their memory."""
        return min(self.free, len(waiting))

    def admit(self, waiting: Sequence[Row]) -> list[tuple[Row, Piece]]:
        """They are read in the next steps."""
        for row in waiting:
            asked, name = row.sampling, str(self._count)
            self._steps.add(
                name,
                row.prompt,
                sorted(row.stop_ids),
                temperature=asked.temperature,
                top_p=asked.top_p if asked.top_p > 0 else 1e-6,  # vLLM refuses 0
                max_tokens=asked.max_tokens,
                seed=row.key,
                logprobs=asked.top_logprobs,
            )
            self._named[name], self._count = row, self._count + 1
        return []

    def step(self) -> list[tuple[Row, Piece]]:
        pieces = []
        for sampled in self._steps.step():
            row = self._named.get(sampled.name)
            if row is not None and not row.finished:
                pieces.append((row, row.take(sampled.token, known(row, sampled))))
        return pieces

    def release(self) -> None:
        """Removes rows that are finished or cancelled."""
        ended = [name for name, row in self._named.items() if row.finished or row.cancelled]
        if ended:
            self._steps.abort(ended)
        for name in ended:
            del self._named[name]


def known(row: Row, sampled: Sampled) -> TokenLogprob | None:
    if row.sampling.top_logprobs is None:
        return None
    others = sorted(sampled.logprobs.items(), key=lambda pair: -pair[1])
    return TokenLogprob(sampled.token, sampled.logprobs[sampled.token], others[: row.sampling.top_logprobs])
