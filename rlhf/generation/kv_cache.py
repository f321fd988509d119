"""The KV cache of the rows that are being sampled, written in place.

S slots, L visible columns. The rows are the first `rows` slots, and all of them end in the same column: a step writes
one column for all rows. So a mask is one comparison per row, relative positions are column differences, and a new row
of any length ends where the others end.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Columns added to a full cache: at least this many, and this fraction of those in use. More columns mean fewer copies
# (and on a GPU fewer new graphs), but every step reads all columns.
SPARE_COLUMNS, SPARE_FRACTION = 32, {"cpu": 0.125, "cuda": 0.25}


@dataclass
class Span:
    """Where the current forward pass writes, and the first column that it sees."""

    rows: slice
    first: int
    at: int


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [slots, heads, columns, head size], allocated at the first write."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = weakref.proxy(cache)  # a reference cycle would keep its memory until the next garbage collection

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, because a masked column has weight 0, and 0 · NaN is NaN.
        self.keys, self.values = (self.cache.room(x, self.cache.columns) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes [rows, heads, columns, head size] and returns views of everything these rows see."""
        span = self.cache.span
        self.write(span.rows, span.at, key_states, value_states)
        seen = slice(span.first, span.at + key_states.shape[2])
        return self.keys[span.rows, :, seen], self.values[span.rows, :, seen]

    def write(self, rows: slice, at: int, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        columns = slice(at, at + key_states.shape[2])
        self.keys[rows, :, columns] = key_states
        self.values[rows, :, columns] = value_states

    def write_column(self, at_1: Tensor, key_SKD: Tensor, value_SKD: Tensor) -> None:
        """Writes one column of the first S slots. Its index is a tensor, so that nothing waits for the device."""
        for x, new in ((self.keys, key_SKD), (self.values, value_SKD)):
            x[: len(new)].index_copy_(2, at_1, new[:, :, None])

    def get_seq_length(self) -> int:
        return self.cache.span.at - self.cache.span.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A transformers cache in which rows join and leave. Call `admit` or `step`, then the forward pass."""

    def __init__(
        self, slots: int, device: torch.device, most_columns: int | None = None, most_tokens: int | None = None
    ) -> None:
        """`most_columns`: the length of the longest row, which limits the columns. `most_tokens`: of all slots together; the
        more columns, the fewer slots, and `make_room` comes before rows are admitted."""
        super().__init__(layers=[])
        self.slots, self.columns, self.most_columns, self.most_tokens = slots, 0, most_columns, most_tokens
        self.moves = 0  # how often the buffers were moved
        self.rows = 0
        self.end = 0  # the column of the next token
        self.start_S = torch.zeros(slots, dtype=torch.int64, device=device)  # the first column of each row
        self.span = Span(slice(0, 0), 0, 0)

    def layer(self, number: int) -> SlotLayer:
        while len(self.layers) <= number:
            self.layers.append(SlotLayer(self))
        return self.layers[number]  # type: ignore[return-value]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        return self.layer(layer_idx).update(key_states, value_states)

    @property
    def slots_now(self) -> int:
        """That the buffers have."""
        if self.most_tokens is None or not self.columns:
            return self.slots
        return min(self.slots, self.most_tokens // self.columns)

    def make_room(self, rows: int) -> None:
        """Fewer columns where that many rows need their memory."""
        if rows > self.slots_now:
            self._move(0)

    def admit(self, length_G: Tensor) -> None:
        """Adds rows whose first `length_G` tokens the next forward pass writes, right-aligned."""
        width = int(length_G.max())
        if not self.rows:
            self.end = min(width, self.columns)
        if self.end < width:
            self._move(width - self.used)
        newcomers = slice(self.rows, self.rows + len(length_G))
        self.start_S[newcomers] = self.end - length_G
        self.rows = newcomers.stop
        self.span = Span(newcomers, self.end - width, self.end - width)

    def fork(self, slot_F: Tensor) -> None:
        """Adds copies of the rows in `slot_F`, which the last forward pass wrote."""
        newcomers, columns = slice(self.rows, self.rows + len(slot_F)), slice(self.span.first, self.end)
        for number in range(len(self.layers)):
            for x in (self.layer(number).keys, self.layer(number).values):
                x[newcomers, :, columns] = x[slot_F, :, columns]
        self.start_S[newcomers] = self.start_S[slot_F]
        self.rows = newcomers.stop

    def step(self) -> None:
        """Prepares a forward pass of one token per row."""
        if self.end == self.columns or self.columns > 2 * self._with_spare(self.used):
            self._move(0)
        self.span = Span(slice(0, self.rows), self.end - self.used, self.end)
        self.end += 1

    def keep(self, alive_S: Tensor) -> Tensor:
        """Removes the other rows; the last rows take their slots. Returns the old slot of each row."""
        alive, self.rows = alive_S.nonzero()[:, 0], int(alive_S.sum())
        free = (~alive_S[: self.rows]).nonzero()[:, 0]
        moved = alive[alive >= self.rows]
        for slot, source, start in zip(free.tolist(), moved.tolist(), self.start_S[moved].tolist(), strict=True):
            for number in range(len(self.layers)):
                for x in (self.layer(number).keys, self.layer(number).values):
                    x[slot, :, start : self.end] = x[source, :, start : self.end]
        from_S = torch.arange(self.rows, device=alive.device)
        from_S[free] = moved
        self.start_S[: self.rows] = self.start_S[from_S]
        return from_S

    @property
    def used(self) -> int:
        """The columns from the first that any row uses to the end."""
        return self.end - int(self.start_S[: self.rows].min()) if self.rows else 0

    def position_S(self) -> Tensor:
        """The position of the last token of each row."""
        return self.end - 1 - self.start_S[: self.rows]

    def mask_SL(self) -> Tensor:
        """True at the visible columns that belong to the row."""
        return self.mask_SC()[:, self.span.first : self.end]

    def mask_SC(self) -> Tensor:
        """True at the columns of the buffer that belong to the row."""
        column_C = torch.arange(self.columns, device=self.start_S.device)
        return (column_C >= self.start_S[: self.rows, None]) & (column_C < self.end)

    def _move(self, to: int) -> None:
        """Moves the used columns to column `to` of a buffer with spare columns."""
        used, start = self.used, self.end - self.used
        self.columns = max(to + used, min(to + self._with_spare(used), self.most_columns or sys.maxsize))
        for layer in self.layers:
            for name in ("keys", "values"):
                x = getattr(layer, name)
                moved = self.room(x, self.columns)
                moved[: self.rows, :, to : to + used] = x[: self.rows, :, start : self.end]
                setattr(layer, name, moved)
                del x  # frees the old one before making the next
        self.start_S += to - start
        self.end = to + used
        self.moves += 1

    def room(self, like: Tensor, columns: int) -> Tensor:
        """For the keys or values of one layer."""
        return like.new_zeros(self.slots_now, like.shape[1], columns, like.shape[3])

    def _with_spare(self, columns: int) -> int:
        return with_spare(columns, self.start_S.device)


def with_spare(columns: int, device: torch.device) -> int:
    """The columns of a cache of which that many are in use."""
    return columns + max(SPARE_COLUMNS, int(SPARE_FRACTION[device.type] * columns))


def rows_that_fit(free: int, bytes_per_token: int, tensors: int, columns: int) -> int:
    """The number of rows of `columns` tokens whose keys and values fit into `free` bytes, in this many tensors of equal
    size. One tensor more is counted, because the cache is moved tensor by tensor."""
    return int(free * tensors // (bytes_per_token * columns * (tensors + 1)))
