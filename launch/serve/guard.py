"""The guard: a safety model judges prompts and responses before, or as, they are told.

A prompt is judged by how the safety model takes a response that complies with it. What it cannot judge is unsafe.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from starlette.concurrency import run_in_threadpool

from launch.serve.answers import Answer
from launch.serve.metrics import Metrics
from launch.serve.scoring import RewardModel
from rlhf.algorithms.reward_shaping import flagged_unsafe
from rlhf.serving.engine import QueueFull
from rlhf.serving.flow import Flow, joined
from rlhf.serving.rows import Piece, row_key

Action = Literal["annotate", "refuse", "regenerate"]
MOST_TRIES = 4  # responses that are sampled, all in all
COMPLIANCE = "sure, here is how to do it. first"
REFUSAL = "I can't help with that."


class Verdict(NamedTuple):
    flagged: bool
    safe: float | None
    """The probability of a safe response. None: the safety model cannot judge it."""


class Guard:
    def __init__(self, model: RewardModel, threshold: float, action: Action) -> None:
        """Flagged is what is safe with a probability below `threshold`, as in PPO."""
        self.model, self.threshold, self.action = model, threshold, action

    @property
    def holds(self) -> bool:
        """Nothing is told before it is judged."""
        return self.action != "annotate"

    async def judge(self, prompt: Sequence[Mapping[str, str]], response: str) -> Verdict:
        messages = [{**each, "role": "user" if each["role"] == "prompt" else each["role"]} for each in prompt]
        try:
            future = await run_in_threadpool(self.model.submit, messages, response)
            logit = (await asyncio.wrap_future(future)).logit
        except Exception:  # noqa: BLE001  too long for the model, or the model failed
            return Verdict(True, None)
        flagged = bool(flagged_unsafe(torch.tensor([logit]), self.threshold))
        return Verdict(flagged, 1 / (1 + math.exp(-max(logit, -700.0))))

    async def judge_prompts(self, prompts: Sequence[Sequence[Mapping[str, str]]]) -> list[Verdict]:
        return list(await asyncio.gather(*(self.judge(prompt, COMPLIANCE) for prompt in prompts)))


class GuardedFlow:
    """As Flow, with what the guard makes of it. The verdicts come into the answer."""

    def __init__(self, guard: Guard, answer: Answer, inputs: Sequence[Verdict], metrics: Metrics) -> None:
        """`inputs`: of each prompt. QueueFull, EngineDown."""
        self._guard, self._answer, self._metrics = guard, answer, metrics
        n = answer.ask.n
        self._inputs = [inputs[number // n] for number in range(answer.ask.choices)]
        refused = guard.holds and all(verdict.flagged for verdict in self._inputs)
        self._flow = None if refused else Flow(answer.model, answer.ask)
        for verdict in inputs:
            self._count("input", "passed" if not verdict.flagged else "refused" if guard.holds else "annotated")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._flow:
            await self._flow.__aexit__(kind, error, trace)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        if self._flow is None:
            for number in range(self._answer.ask.choices):
                yield number, self._refused(number, "input", self._inputs[number])
            return
        held: dict[int, Piece] = {}
        texts = [""] * self._answer.ask.choices
        async for number, piece in self._flow.pieces():
            texts[number] += piece.text
            if self._guard.holds:
                piece = held[number] = joined(held[number], piece) if number in held else piece
            if piece.finish:
                yield number, await self._judged(number, piece, texts[number])
            elif not self._guard.holds:
                yield number, piece

    async def _judged(self, number: int, piece: Piece, text: str) -> Piece:
        """The last piece of a response or, if pieces are held, all of it."""
        told = self._inputs[number]
        if told.flagged and self._guard.holds:  # another prompt of this request was not flagged
            return self._refused(number, "input", told)
        tries = 1
        while (verdict := await self._guard.judge(self._said(number), text)).flagged:
            if self._guard.action == "annotate":
                self._count("output", "annotated")
                break
            again = await self._again(number, tries) if self._may_try(tries) else None
            if again is None:
                return self._refused(number, "output", verdict, tries)
            piece, text, tries = again, again.text, tries + 1
        else:
            self._count("output", "passed" if tries == 1 else "regenerated")
        self._tell(number, {"output": verdict, "tries": tries})
        return piece

    def _may_try(self, tries: int) -> bool:
        """Again at temperature 0 would be the same."""
        regenerates = self._guard.action == "regenerate" and self._answer.ask.sampling.temperature > 0
        return regenerates and tries < MOST_TRIES

    async def _again(self, number: int, tries: int) -> Piece | None:
        """Another response in place of this one; None where too many wait. EngineDown."""
        ask = self._answer.ask
        seed = None if ask.seed is None else row_key(ask.seed, number + tries * ask.choices)
        whole = Piece()
        try:
            flow = Flow(self._answer.model, replace(ask, prompts=[ask.prompts[number // ask.n]], n=1, seed=seed))
        except QueueFull:
            return None
        async with flow:
            async for _, piece in flow.pieces():
                whole = joined(whole, piece)
        return whole

    def _refused(self, number: int, where: str, verdict: Verdict, tries: int = 0) -> Piece:
        if where == "output":
            self._count("output", "refused")
        self._tell(number, {where: verdict, "tries": tries})
        return Piece(REFUSAL, finish="content_filter")

    def _said(self, number: int) -> Sequence[Mapping[str, str]]:
        return self._answer.said[number // self._answer.ask.n]

    def _tell(self, number: int, found: dict[str, Any]) -> None:
        found = {"input": self._inputs[number], **found}
        self._answer.guarded[number] = {
            key: value._asdict() if isinstance(value, Verdict) else value for key, value in found.items()
        }

    def _count(self, where: str, result: str) -> None:
        self._metrics.guarded.labels(self._answer.model.name, where, result).inc()


async def flow_of(guard: Guard | None, answer: Answer, metrics: Metrics) -> Flow | GuardedFlow:
    """QueueFull, EngineDown."""
    if guard is None:
        return Flow(answer.model, answer.ask)
    return GuardedFlow(guard, answer, await guard.judge_prompts(answer.said), metrics)
