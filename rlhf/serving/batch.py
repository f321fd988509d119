"""The rows in the KV cache of one model. They join and leave between any two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.generation.in_process import CACHE_FRACTION, PREFILL_TOKENS, decoder_of
from rlhf.generation.kv_cache import SlotCache, with_spare
from rlhf.models import positions
from rlhf.profiling.memory import free_bytes
from rlhf.profiling.roofline import size_of
from rlhf.serving.rows import Piece, Row
from rlhf.serving.sampling import Drawing

MOST_ROWS = 64
# A model with a long context gets a shorter one where memory holds fewer whole rows than this, but never below that length.
ROWS_WANTED, CONTEXT_WANTED = 8, 4096


@dataclass(frozen=True)
class Room:
    tokens: int
    """Whose keys and values memory holds."""
    context: int
    """Tokens of a prompt and its response together."""

    def fitting(self, running: Sequence[int], waiting: Sequence[int], device: torch.device) -> int:
        """How many of the first waiting rows memory holds beside the running ones, at the most tokens that each may come to.
        All rows have as many columns as the widest."""
        count, widest = len(running), max(running, default=0)
        for place, tokens in enumerate(waiting):
            widest = max(widest, tokens)
            if (count + place + 1) * min(with_spare(widest, device), self.context) > self.tokens:
                return place
        return len(waiting)


def room_for(model: Any, free: int | None = None) -> Room:
    """The tokens and the context whose keys and values fit into memory. UserError (5) if there is hardly any."""
    device = next(model.parameters()).device
    free = int(CACHE_FRACTION * free_bytes(device)) if free is None else free
    tensors = 2 * model.config.get_text_config().num_hidden_layers
    # One tensor more, because the cache is moved tensor by tensor.
    tokens = int(free * tensors // (size_of(model).cache_bytes * (tensors + 1)))
    return Room(tokens, context_for(tokens, positions(model.config)))


def context_for(tokens: int, limit: int | None) -> int:
    """Of a model with `limit` positions, where memory holds this many tokens. UserError (5) for hardly any."""
    context = min(limit or tokens, max(tokens // ROWS_WANTED, min(tokens, CONTEXT_WANTED)))
    if context < 2:
        raise UserError("the free memory does not hold the keys and values of one row", 5)
    return context


class Batch:
    """Row n is in slot n of the cache. The tokens that were drawn are not yet read by the model."""

    def __init__(self, model: Any, room: Room) -> None:
        self.model, self.room = model, room
        self.decoder = decoder_of(model, alone=True)
        self.device: torch.device = next(model.parameters()).device
        self.rows: list[Row] = []
        self.token_S = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.cache = SlotCache(MOST_ROWS, self.device, room.context, room.tokens)
        self.drawing = Drawing.of([], self.device)

    @property
    def free(self) -> int:
        """Slots, if memory suffices."""
        return MOST_ROWS - len(self.rows)

    def next_group(self, waiting: Sequence[Row]) -> int:
        """How many of the first waiting rows join together."""
        first = waiting[: self.free]
        fitting = self.room.fitting([row.most for row in self.rows], [row.most for row in first], self.device)
        return next_group(first, fitting)

    def admit(self, waiting: Sequence[Row]) -> list[tuple[Row, Piece]]:
        """Reads the prompts of `waiting`, equal ones once, and draws their first tokens. As many as `next_group` says."""
        self.cache.make_room(len(self.rows) + len(waiting))
        source = first_with_prompt(waiting)
        read = [n for n, first in enumerate(source) if first == n]
        copies = [n for n, first in enumerate(source) if first != n]
        slot = len(self.rows)
        logits_DV = self.decoder.prefill(*self._padded([waiting[n].prompt for n in read]), self.cache)
        place = {n: where for where, n in enumerate(read)}
        copied = [place[source[n]] for n in copies]
        self.cache.fork(torch.tensor([slot + where for where in copied], dtype=torch.int64, device=self.device))
        newcomers = [waiting[n] for n in read + copies]
        logits_GV = logits_DV[torch.tensor([*range(len(read)), *copied], device=self.device)]
        self.rows = [*self.rows, *newcomers]
        drawing = Drawing.of(newcomers, self.device)
        token_G, pieces = self._draw(drawing, logits_GV, newcomers)
        self.token_S = torch.cat([self.token_S, token_G])
        self.drawing = Drawing.of(self.rows, self.device)
        return pieces

    def step(self) -> list[tuple[Row, Piece]]:
        """One more token for every row."""
        logits_SV = self.decoder.step(self.token_S, self.cache)
        self.token_S, pieces = self._draw(self.drawing, logits_SV, self.rows)
        self.drawing.position_S += 1
        return pieces

    def release(self) -> None:
        """Removes rows that are finished or cancelled."""
        alive = [not (row.finished or row.cancelled) for row in self.rows]
        if all(alive):
            return
        from_S = self.cache.keep(torch.tensor(alive, device=self.device))
        self.rows = [self.rows[n] for n in from_S.tolist()]
        self.token_S = self.token_S[from_S]
        self.drawing = Drawing.of(self.rows, self.device)

    def _draw(self, drawing: Drawing, logits_SV: Tensor, rows: Sequence[Row]) -> tuple[Tensor, list[tuple[Row, Piece]]]:
        token_S = drawing.tokens(logits_SV)
        tokens = token_S.tolist()
        logprobs = drawing.known(logits_SV, tokens)
        taken = zip(rows, tokens, logprobs, strict=True)
        return token_S, [(row, row.take(token, logprob)) for row, token, logprob in taken]

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """tokens_GW and mask_GW, padded on the left."""
        width = max(map(len, prompts))
        tokens = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
        return torch.tensor(tokens, device=self.device), torch.tensor(mask, device=self.device)


def next_group(waiting: Sequence[Row], free: int) -> int:
    """How many of the first waiting rows join together: as many as have a slot, with no more prompt tokens, padding
    counted, than one forward pass reads at full rate, but at least one."""
    width, prompts = 0, set()
    for count, row in enumerate(waiting[:free]):
        width = max(width, len(row.prompt))
        prompts.add(tuple(row.prompt))
        if count and width * len(prompts) > PREFILL_TOKENS:
            return count
    return min(free, len(waiting))


def first_with_prompt(rows: Sequence[Row]) -> list[int]:
    """For each row the first one with an equal prompt."""
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(tuple(row.prompt), n) for n, row in enumerate(rows)]
