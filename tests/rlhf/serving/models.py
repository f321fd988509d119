"""A small Llama with random weights in a folder, and responses of an engine, waited for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from rlhf.config import TinyConfig
from rlhf.models import save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama
from rlhf.serving.model import Ask, ServedModel
from rlhf.serving.rows import Piece, Row

TINY = TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2)
TEXTS = ["hello there, how are you? fine", "what is 2 + 2? it is 4"] * 20
PATIENCE_S = 60


def make_folder(folder: Path, seed: int = 0) -> Path:
    tokenizer = train_tokenizer(TEXTS, 300)
    save_causal(untrained_llama(TINY, tokenizer, seed), folder, tokenizer)
    return folder


class Asked:
    """The rows of an Ask, and what has been told of them."""

    def __init__(self, model: ServedModel, ask: Ask) -> None:
        self.pieces: list[list[Piece]] = [[] for _ in range(ask.choices)]
        self._left, self._done = ask.choices, threading.Event()
        self._model, self.rows = model, model.rows(ask, self._take)

    def _take(self, number: int, piece: Piece) -> None:
        self.pieces[number].append(piece)
        if piece.finish:
            self._left -= 1
            if not self._left:
                self._done.set()

    def send(self) -> Asked:
        self._model.engine.submit(self.rows)
        return self

    def wait(self) -> list[str]:
        assert self._done.wait(PATIENCE_S), "no response"
        return texts(self.pieces)


def texts(pieces: Sequence[Sequence[Piece]]) -> list[str]:
    return ["".join(piece.text for piece in of_row) for of_row in pieces]


def finishes(asked: Asked) -> list[str | None]:
    return [of_row[-1].finish for of_row in asked.pieces]


def running(rows: Sequence[Row]) -> int:
    return sum(not row.finished for row in rows)
