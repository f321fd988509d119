"""What the routes share: the models, what is allowed, and what is counted."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from sqlalchemy.exc import DBAPIError

from launch.serve.answers import Answer
from launch.serve.background import BackgroundScoring
from launch.serve.errors import ApiError
from launch.serve.gate import Limits
from launch.serve.guard import Guard
from launch.serve.metrics import Metrics
from rlhf.serving.engine import EngineDown, Pieces
from rlhf.serving.model import ServedModel
from rlhf.serving.store import Writer
from rlhf.serving.watch.baseline import Baseline

MOST_RECENT = 20_000
OTHERS_S, LOOK_S = 2.0, 0.1  # until the store has what another process was asked before


class Others(Protocol):
    """The processes that share the work with this one."""

    async def metrics(self) -> bytes: ...  # of all, this one too


@dataclass
class Service:
    models: dict[str, ServedModel]
    """By name; the first is the default."""
    token: str
    system: str = ""
    """Said to the model where a dialogue has no system message."""
    max_output: int = 1024
    """Tokens of a response."""
    limits: Limits = field(default_factory=Limits)
    writer: Writer | None = None
    """Keeps exchanges and votes; None: nothing is kept."""
    guard: Guard | None = None
    scoring: BackgroundScoring | None = None
    """Scores what the writer keeps."""
    baseline: Baseline | None = None
    """What the responses are compared with."""
    others: Others | None = None
    stopping: bool = False
    active: int = 0
    """Requests that are being answered."""

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.models, self.writer, lambda: self.scoring)
        self._recent: OrderedDict[str, None] = OrderedDict()  # responses that the store may not have yet
        self._deliver: Callable[[Pieces], None] | None = None

    @property
    def started(self) -> bool:
        return self._deliver is not None

    def start(self, deliver: Callable[[Pieces], None]) -> None:
        """`deliver`: see Engine.start."""
        self._deliver = deliver
        for model in self.models.values():
            model.engine.start(deliver)

    def replace(self, model: ServedModel) -> None:
        """Takes the place of the model of this name for new requests; those that run end on the old one.

        From any thread. EngineDown, and the old one stays, where the new one samples nothing.
        """
        assert self._deliver, "not started"
        model.engine.start(self._deliver)
        try:
            model.check()
        except EngineDown:
            model.engine.close()
            raise
        self.models[model.name] = model

    def model(self, name: str | None) -> ServedModel:
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no such model; there is {known}", "model_not_found", "model")
        return self.models[name]

    def length(self, model: ServedModel, prompts: Sequence[list[int]], wanted: int | None) -> int:
        """The most tokens of a response. ApiError (400) where prompt and response do not fit."""
        longest = max(map(len, prompts))
        room = model.context - longest
        if room < (wanted or 1):
            asked = f"{longest} tokens of a prompt and {wanted or 1} of a response"
            raise ApiError(400, f"the model holds {model.context} tokens, not {asked}", "context_length_exceeded")
        if wanted and wanted > self.max_output:
            text = f"max_tokens is {wanted}, and the most is {self.max_output}"
            raise ApiError(400, text, "invalid_value", "max_tokens")
        return wanted or min(room, self.max_output)

    @contextmanager
    def watched(self, answer: Answer) -> Iterator[None]:
        self.active += 1
        name, start = answer.model.name, time.monotonic()
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.gone.labels(name).inc()
            raise
        else:
            self._keep(answer, start)
        finally:
            self.active -= 1
            self.metrics.prompt_tokens.labels(name).inc(answer.ask.prompt_tokens)
            self.metrics.completion_tokens.labels(name).inc(answer.completion_tokens)
            self.metrics.request_s.labels(name).observe(time.monotonic() - start)
            if answer.first_token_at is not None:
                self.metrics.first_token_s.labels(name).observe(answer.first_token_at - start)

    def _keep(self, answer: Answer, start: float) -> None:
        if self.writer is None or not all(piece.finish for piece in answer.pieces):
            return
        first_token_s = None if answer.first_token_at is None else answer.first_token_at - start
        for exchange in answer.exchanges(time.monotonic() - start, first_token_s):
            if self.writer.add(exchange):
                self._recent[exchange.id] = None
        while len(self._recent) > MOST_RECENT:
            self._recent.popitem(last=False)

    def knows(self, ids: Sequence[str]) -> bool:
        """Whether these responses are kept, or will be. ApiError (503) while the store does not answer."""
        if self.writer is None:
            return False
        unknown = [each for each in ids if each not in self._recent]
        deadline = time.monotonic() + (OTHERS_S if self.others else 0.0)
        try:
            while unknown and not (known := self.writer.store.knows(unknown)) and time.monotonic() < deadline:
                time.sleep(LOOK_S)
            return not unknown or known
        except DBAPIError:
            raise ApiError(503, "the store does not answer; try again later", "no_store") from None

    async def metrics_text(self) -> bytes:
        return await self.others.metrics() if self.others else self.metrics.text()
