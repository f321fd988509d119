"""One response that is being sampled: what was asked, what is known of it, and the pieces in which it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.chat.stream import TextStream

Finish = Literal["stop", "length", "failed", "content_filter"]


@dataclass(frozen=True)
class Sampling:
    max_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set of the likeliest ones that has this probability."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told beside each token; None: no logprobs."""


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    logprob: float
    """Of the model itself: at temperature 1, without top_p."""
    top: list[tuple[int, float]]


@dataclass
class Piece:
    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(eq=False)
class Row:
    """Used by the engine's thread alone, but for `cancelled`."""

    prompt: list[int]
    sampling: Sampling
    key: int
    """Of its random numbers, see `row_key`."""
    stop_ids: frozenset[int]
    stream: TextStream
    sink: Callable[[Piece], Any]
    """Called with every piece, in the thread that the engine delivers to."""
    length: int = 0
    cancelled: bool = False
    finished: bool = False

    @property
    def most(self) -> int:
        """Tokens of the prompt and of the longest response that is allowed."""
        return len(self.prompt) + self.sampling.max_tokens

    def take(self, token: int, logprob: TokenLogprob | None) -> Piece:
        """The piece that the next token adds; a token that ends the response adds no text."""
        self.length += 1
        piece = Piece(tokens=1)
        if token in self.stop_ids:
            piece.finish = "stop"
        else:
            piece.logprobs = [logprob] if logprob else []
            piece.text = self.stream.push(token)
            if self.stream.stopped:
                piece.finish = "stop"
            elif self.length == self.sampling.max_tokens:
                piece.finish = "length"
        if piece.finish and not self.stream.stopped:
            piece.text += self.stream.finish()
            if self.stream.stopped:
                piece.finish = "stop"
        self.finished = piece.finish is not None
        return piece


def row_key(seed: int, index: int) -> int:
    """The key of the random numbers of response `index` of a request with this seed: 63 bits."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
