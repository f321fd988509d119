"""Pieces of responses in OpenAI's form: at once, or as events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlhf.serving.flow import joined
from rlhf.serving.model import Ask, ServedModel
from rlhf.serving.rows import Piece, TokenLogprob
from rlhf.serving.store import Exchange

Said = Sequence[Mapping[str, str]]
Kind = Literal["chat", "completion"]
PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}
OBJECT = {"chat": "chat.completion", "completion": "text_completion"}
CHUNK = {"chat": "chat.completion.chunk", "completion": "text_completion"}


class Answer:
    """What has been said in answer to one request."""

    def __init__(self, kind: Kind, model: ServedModel, ask: Ask, said: Sequence[Said], user: str | None = None) -> None:
        """`said`: the messages of each prompt."""
        self.kind: Kind = kind
        self.model, self.ask, self.said, self.user = model, ask, said, user
        self.id = PREFIX[kind] + uuid.uuid4().hex
        self.created = int(time.time())
        self.pieces = [Piece() for _ in range(ask.choices)]
        self.guarded: dict[int, dict[str, Any]] = {}  # what the guard says of each response
        self.first_token_at: float | None = None

    def add(self, number: int, piece: Piece) -> None:
        self.first_token_at = self.first_token_at or time.monotonic()
        self.pieces[number] = joined(self.pieces[number], piece)

    @property
    def completion_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    def usage(self) -> dict[str, int]:
        prompt, completion = self.ask.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(number, piece, "message") for number, piece in enumerate(self.pieces)]
        return {**self._head(OBJECT), "choices": choices, "usage": self.usage()}

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        return {**self._head(CHUNK), "choices": [self._choice(number, piece, "delta")]}

    def openings(self) -> list[dict[str, Any]]:
        """Of a chat: who speaks."""
        if self.kind == "completion":
            return []
        start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        head = self._head(CHUNK)
        return [{**head, "choices": [{"index": number, **start}]} for number in range(self.ask.choices)]

    def closing(self) -> dict[str, Any]:
        return {**self._head(CHUNK), "choices": [], "usage": self.usage()}

    def exchanges(self, seconds: float, first_token_s: float | None = None) -> list[Exchange]:
        """What the store keeps of it."""
        sampling = self.ask.sampling
        how: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        how |= {"max_tokens": sampling.max_tokens} | ({} if self.ask.seed is None else {"seed": self.ask.seed})
        return [
            Exchange(
                id=f"{self.id}:{number}",
                kind=self.kind,
                model=self.model.name,
                digest=self.model.digest,
                version=self.model.version,
                messages=self.said[number // self.ask.n],
                response=piece.text,
                finish=piece.finish or "",
                prompt_tokens=len(self.ask.prompts[number // self.ask.n]),
                completion_tokens=piece.tokens,
                seconds=seconds,
                first_token_s=first_token_s,
                sampling=how | ({"guard": self.guarded[number]} if number in self.guarded else {}),
                user=self.user,
            )
            for number, piece in enumerate(self.pieces)
        ]

    def _head(self, names: dict[str, str]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": names[self.kind],
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.version or self.model.digest,
        }

    def _choice(self, number: int, piece: Piece, slot: str) -> dict[str, Any]:
        told = self.ask.sampling.top_logprobs is not None
        head: dict[str, Any] = {"index": number, "finish_reason": piece.finish}
        if piece.finish and number in self.guarded:
            head["guard"] = self.guarded[number]
        if self.kind == "completion":
            logprobs = completion_logprobs(self.model.token_text, piece.logprobs) if told else None
            return {**head, "text": piece.text, "logprobs": logprobs}
        message = {"content": piece.text} if slot == "delta" else {"role": "assistant", "content": piece.text}
        logprobs = chat_logprobs(self.model.token_text, piece.logprobs) if told else None
        return {**head, slot: message, "logprobs": logprobs}


def chat_logprobs(text: Callable[[int], str], known: list[TokenLogprob]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text(token), "logprob": logprob, "bytes": list(text(token).encode())}

    return {
        "content": [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top]} for each in known
        ]
    }


def completion_logprobs(text: Callable[[int], str], known: list[TokenLogprob]) -> dict[str, Any]:
    tokens = [text(each.token) for each in known]
    offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in known],
        "top_logprobs": [{text(token): logprob for token, logprob in each.top} for each in known],
        "text_offset": offsets,
    }


def event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
