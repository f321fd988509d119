"""Sampling steps as CUDA graphs, captured for one position of the cache and replayed by one call.

A step is hundreds of small kernels, and launching them one by one takes several times as long as running them.

S rows in the cache, K key heads, Q query heads per key head, C columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.generation.kv_cache import SlotCache

PARTS = 8  # graphs exist for this many numbers of rows, to which the rows are rounded up


@dataclass(frozen=True)
class StepInput:
    """The inputs of a step. Rows after those of the cache are placeholders whose results are not used."""

    token_S: Tensor
    position_S: Tensor
    bias_SKQC: Tensor  # 0 where a row attends to a column, else -inf
    at_1: Tensor  # the column that it writes


Step = Callable[[StepInput], Tensor]  # → logits_SV


class StepGraphs:
    """Steps of one decoder over one cache. Nothing else may use the device, which would break a capture. The result is
    valid until the next step."""

    def __init__(self, cache: SlotCache, heads: tuple[int, int], dtype: torch.dtype) -> None:
        self.cache, self.heads, self.dtype = cache, heads, dtype
        self.moves = -1  # of the cache, when the graphs were captured
        self.seen: set[int] = set()
        self.graphs: dict[int, Step] = {}
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def __call__(self, step: Step, token_S: Tensor) -> Tensor:
        """The logits_SV of the next `step`. Captured when a number of rows occurs for the second time."""
        if self.cache.moves != self.moves:
            self.moves, self.seen, self.graphs = self.cache.moves, set(), {}
        rows = len(token_S)
        size = rows_of_graph(rows, self.cache.slots_now)
        given = self._input(token_S, size)
        if size in self.seen and size not in self.graphs:
            self.graphs[size] = record(step, given, self.stream)
        self.seen.add(size)
        return self.graphs.get(size, step)(given)[:rows]

    def _input(self, token_N: Tensor, size: int) -> StepInput:
        N, cache, (K, Q) = len(token_N), self.cache, self.heads
        token_S, position_S = (token_N.new_zeros(size) for _ in range(2))
        token_S[:N], position_S[:N] = token_N, cache.position_S()
        # Placeholder rows see all columns of theirs: a fully masked row would leave NaN in its slot.
        bias_SC = torch.zeros(size, cache.columns, dtype=self.dtype, device=token_N.device)
        bias_SC[:N].masked_fill_(~cache.mask_SC(), float("-inf"))
        bias_SKQC = bias_SC[:, None, None].expand(-1, K, Q, -1).contiguous()
        return StepInput(token_S, position_S, bias_SKQC, token_N.new_full((1,), cache.span.at))


def rows_of_graph(rows: int, slots: int) -> int:
    """The next of `PARTS` numbers up to `slots`."""
    part = -(-slots // PARTS)
    return min(-(-rows // part) * part, slots)


def record(step: Step, given: StepInput, stream: Any) -> Step:
    """`step` as a graph, captured on `stream`, for inputs with the shapes of `given`.

    A step of these shapes must have run before, because libraries cannot load a kernel during a capture.
    """
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Threads that do not use the device, such as MLflow's, may run during a capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            logits_SV = step(given)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay(new: StepInput) -> Tensor:
        for own, other in zip(vars(given).values(), vars(new).values(), strict=True):
            own.copy_(other)
        graph.replay()
        return logits_SV

    return replay
