"""Steps of the sampler as CUDA graphs: recorded for a cache as it lies, and replayed by one call.

A step is hundreds of small kernels, and to start them one by one takes several times as long as they run.

S rows in the cache, K key heads, Q query heads to each, C columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.sampling.cache import SlotCache

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
    """Steps of one decoder over one cache. What comes back stands until the next step."""

    def __init__(self, step: Step, cache: SlotCache, heads: tuple[int, int], dtype: torch.dtype) -> None:
        self.step, self.cache, self.heads, self.dtype = step, cache, heads, dtype
        self.moves = -1  # of the cache, when the graphs were recorded
        self.seen: set[int] = set()
        self.graphs: dict[int, Step] = {}

    def __call__(self, token_S: Tensor) -> Tensor:
        """The logits_SV of the step that the cache stands before. Recorded where as many rows come for a second time."""
        if self.cache.moves != self.moves:
            self.moves, self.seen, self.graphs = self.cache.moves, set(), {}
        rows = len(token_S)
        size = rows_of_graph(rows, self.cache.slots)
        given = self._input(token_S, size)
        if size in self.seen and size not in self.graphs:
            self.graphs[size] = record(self.step, given)
        self.seen.add(size)
        return self.graphs.get(size, self.step)(given)[:rows]

    def _input(self, token_S: Tensor, size: int) -> StepInput:
        rows, cache, (K, Q) = len(token_S), self.cache, self.heads
        token, position = (token_S.new_zeros(size) for _ in range(2))
        token[:rows], position[:rows] = token_S, cache.position_S()
        # Rows that are gone see all that was theirs: were all hidden from them, NaN would stay in their slots.
        bias_SC = torch.zeros(size, cache.columns, dtype=self.dtype, device=token_S.device)
        bias_SC[:rows].masked_fill_(~cache.mask_SC(), float("-inf"))
        bias_SKQC = bias_SC[:, None, None].expand(-1, K, Q, -1).contiguous()
        return StepInput(token, position, bias_SKQC, token_S.new_full((1,), cache.span.at))


def rows_of_graph(rows: int, slots: int) -> int:
    """The next of `PARTS` numbers up to `slots`."""
    part = -(-slots // PARTS)
    return min(-(-rows // part) * part, slots)


def record(step: Step, given: StepInput) -> Step:
    """`step` as a graph, for inputs of the shapes of `given`, which may be computed twice."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(given)  # libraries make their plans and workspaces, which a recording may not
        # Other threads may go on: the trainer, where it updates beside the sampler.
        graph.capture_begin(capture_error_mode="thread_local")
        logits_SV = step(given)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay(new: StepInput) -> Tensor:
        for own, other in zip(vars(given).values(), vars(new).values(), strict=True):
            own.copy_(other)
        graph.replay()
        return logits_SV

    return replay
