"""Steps of the sampler as CUDA graphs: recorded for a cache as it lies, and replayed by one call.

A step is hundreds of small kernels, and to start them one by one takes several times as long as they run.

S rows in the cache, K key heads, Q query heads to each, C columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.generation.kv_cache import SlotCache

PARTS = 8  # graphs are of so many numbers of rows: a row more or less needs no new one


@dataclass(frozen=True)
class StepInput:
    """What a step reads. Rows behind those of the cache stand in for rows that are gone; nobody asks what they give."""

    token_S: Tensor
    position_S: Tensor
    bias_SKQC: Tensor  # 0 where a row sees a column, else -inf
    at_1: Tensor  # the column that it writes


Step = Callable[[StepInput], Tensor]  # → logits_SV


class StepGraphs:
    """Steps of one decoder over one cache, while nothing else works on the device: that would break a recording. What
    comes back stands until the next step."""

    def __init__(self, cache: SlotCache, heads: tuple[int, int], dtype: torch.dtype) -> None:
        self.cache, self.heads, self.dtype = cache, heads, dtype
        self.moves = -1  # of the cache, when the graphs were recorded
        self.seen: set[int] = set()
        self.graphs: dict[int, Step] = {}
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def __call__(self, step: Step, token_S: Tensor) -> Tensor:
        """The logits_SV of the `step` that the cache stands before. Recorded where as many rows come for a second time."""
        if self.cache.moves != self.moves:
            self.moves, self.seen, self.graphs = self.cache.moves, set(), {}
        rows = len(token_S)
        size = rows_of_graph(rows, self.cache.slots)
        given = self._input(token_S, size)
        if size in self.seen and size not in self.graphs:
            self.graphs[size] = record(step, given, self.stream)
        self.seen.add(size)
        return self.graphs.get(size, step)(given)[:rows]

    def _input(self, token_N: Tensor, size: int) -> StepInput:
        N, cache, (K, Q) = len(token_N), self.cache, self.heads
        token_S, position_S = (token_N.new_zeros(size) for _ in range(2))
        token_S[:N], position_S[:N] = token_N, cache.position_S()
        # Rows that are gone see all that was theirs: were all hidden from them, NaN would stay in their slots.
        bias_SC = torch.zeros(size, cache.columns, dtype=self.dtype, device=token_N.device)
        bias_SC[:N].masked_fill_(~cache.mask_SC(), float("-inf"))
        bias_SKQC = bias_SC[:, None, None].expand(-1, K, Q, -1).contiguous()
        return StepInput(token_S, position_S, bias_SKQC, token_N.new_full((1,), cache.span.at))


def rows_of_graph(rows: int, slots: int) -> int:
    """The next of `PARTS` numbers up to `slots`."""
    part = -(-slots // PARTS)
    return min(-(-rows // part) * part, slots)


def record(step: Step, given: StepInput, stream: Any) -> Step:
    """`step` as a graph, recorded on `stream`, for inputs of the shapes of `given`.

    A step of these shapes must have been computed before: a recording cannot wait for libraries that load a kernel.
    """
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Threads that never touch the device, MLflow's say, are none of a recording's business.
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
