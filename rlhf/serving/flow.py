"""Pieces of a request as they are made, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from rlhf.serving.engine import EngineDown
from rlhf.serving.model import Ask, ServedModel
from rlhf.serving.rows import Piece

LOOK_S = 5.0  # between two looks whether the engine still makes progress


class Flow:
    """The responses to one request. Leaving the block frees the rows that are unfinished."""

    def __init__(self, model: ServedModel, ask: Ask) -> None:
        """QueueFull, EngineDown. Engines deliver to the event loop that this is called in."""
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._model, self._engine = model, model.engine  # the engine lives while the model does
        self._left = ask.choices
        self._rows = model.rows(ask, lambda number, piece: self._queue.put_nowait((number, piece)))
        self._engine.submit(self._rows)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._left:
            self._engine.cancel(self._rows)
        self._rows = []  # they refer to this object: as a cycle both would keep the model for long

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the response, piece); what came meanwhile for one response is one piece. EngineDown."""
        while self._left:
            merged: dict[int, Piece] = {}
            for number, piece in [await self._next(), *self._there()]:
                if piece.finish == "failed":
                    raise EngineDown
                self._left -= piece.finish is not None
                merged[number] = joined(merged[number], piece) if number in merged else piece
            for item in merged.items():
                yield item

    async def _next(self) -> tuple[int, Piece]:
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    return await self._queue.get()
            except TimeoutError:
                if self._engine.stalled:
                    raise EngineDown from None

    def _there(self) -> list[tuple[int, Piece]]:
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]


def joined(first: Piece, second: Piece) -> Piece:
    return Piece(
        first.text + second.text,
        first.tokens + second.tokens,
        first.logprobs + second.logprobs,
        second.finish,
    )
