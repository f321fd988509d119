"""A model with its tokenizer, chat format and engine."""

from __future__ import annotations

import queue
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf.chat import ChatMessage, format_of
from rlhf.chat.stream import TextStream
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer
from rlhf.serving.batch import Batch, Room, room_for
from rlhf.serving.engine import STALLED_S, Engine, EngineDown
from rlhf.serving.rows import Piece, Row, Sampling, row_key

EngineName = Literal["own", "vllm"]


@dataclass(frozen=True)
class Ask:
    """What a request wants of a model: `n` responses to each prompt."""

    prompts: Sequence[list[int]]
    sampling: Sampling
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    strip: bool = False
    """Without white space at the ends, as chat formats have it."""

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def _with_own(folder: str | Path, device: torch.device) -> tuple[Room, Callable[[], Batch]]:
    model: Any = load_causal(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.eval().requires_grad_(False).to(device)
    room = room_for(model)
    return room, lambda: Batch(model, room)


def _with_vllm(folder: Path, device: torch.device) -> tuple[Room, Callable[[], Any]]:
    from rlhf.serving.vllm_batch import VLLMModel

    model = VLLMModel(folder, device)
    return model.room, model.batch


class ServedModel:
    """Its engine ends when nothing refers to the model any more: no request, and no service."""

    def __init__(
        self,
        name: str,
        folder: str | Path,
        most_waiting: int,
        digest: str | None = None,
        version: str | None = None,
        engine: EngineName = "own",
    ) -> None:
        """`version`: of the registry. UserError (4, 5) for a folder without a causal model, and where memory does not
        hold one row."""
        self.name, self.digest, self.version, self.created = name, digest, version, int(time.time())
        self.tokenizer = load_tokenizer(folder)
        self.chat = format_of(self.tokenizer)
        # Tokenizers change their settings while they encode: one thread at a time, and another one to decode.
        self._encoding = threading.Lock()
        self._decoding = load_tokenizer(folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.room, make_batch = _with_vllm(Path(folder), device) if engine == "vllm" else _with_own(folder, device)
        self.stop_ids = frozenset(self.chat.stop_ids)
        self.engine = Engine(make_batch, most_waiting)
        weakref.finalize(self, self.engine.stop).atexit = False

    @property
    def context(self) -> int:
        return self.room.context

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """UserError (3) for messages that the chat format cannot hold."""
        with self._encoding:
            return self.chat.encode_prompt(messages)

    def encode_text(self, text: str) -> list[int]:
        """With the token that begins a text, where the tokenizer has one. UserError (3) for no tokens."""
        with self._encoding:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:1] != [begin]:
            ids = [begin, *ids]
        if not ids:
            raise UserError("the prompt is empty, and this model has no token that begins a text", 3)
        return ids

    def check_ids(self, ids: Sequence[int]) -> None:
        """UserError (3) for ids that are not the tokenizer's."""
        if not ids or not all(0 <= token < len(self.tokenizer) for token in ids):
            raise UserError(f"a prompt of tokens needs ids from 0 to {len(self.tokenizer) - 1}", 3)

    def text(self, ids: Sequence[int]) -> str:
        return self._decoding.decode(list(ids), clean_up_tokenization_spaces=False)

    def token_text(self, token: int) -> str:
        return self.text([token])

    def check(self) -> None:
        """Samples a token. EngineDown where that does not work."""
        told: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.engine.submit(self.rows(Ask([[0]], Sampling(1, 0.0), seed=0), lambda _, piece: told.put(piece)))
        try:
            finish = told.get(timeout=STALLED_S).finish
        except queue.Empty:
            finish = "failed"
        if finish == "failed":
            raise EngineDown

    def rows(self, ask: Ask, sink: Callable[[int, Piece], Any]) -> list[Row]:
        """`sink` gets the pieces of each response with its number."""
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        return [self._row(ask, number, seed, sink) for number in range(ask.choices)]

    def _row(self, ask: Ask, number: int, seed: int, sink: Callable[[int, Piece], Any]) -> Row:
        return Row(
            prompt=ask.prompts[number // ask.n],
            sampling=ask.sampling,
            key=row_key(seed, number),
            stop_ids=self.stop_ids,
            stream=TextStream(self._decoding, ask.stop, ask.strip),
            sink=lambda piece: sink(number, piece),
        )
