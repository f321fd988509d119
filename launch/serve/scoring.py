"""A reward model beside the server, and the thread in which it scores."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import NamedTuple

import torch

from launch.implicit_reward import ImplicitReward
from launch.score import Text, load_reward_model, score_texts
from launch.serve.source import digest_of
from rlhf.chat import format_of
from rlhf.chat.messages import Turn
from rlhf.errors import UserError
from rlhf.models import load_tokenizer, positions

log = logging.getLogger(__name__)

MOST_AT_ONCE = 16


class Score(NamedTuple):
    value: float
    """The logit minus its mean over SFT responses, as `rlhf score` writes it."""
    logit: float
    """What the model says. σ of a safety model's logit is the probability of a safe response."""


class _Asked(NamedTuple):
    text: Text
    future: Future[Score]


class RewardModel:
    """Scores pairs of a prompt and a response; those that wait are scored together, in one thread."""

    def __init__(self, folder: Path) -> None:
        """UserError (4) for a folder without a reward model."""
        self.folder, self.digest = folder, digest_of(folder)
        self._tokenizer, model = load_tokenizer(folder), load_reward_model(folder)
        self._chat = format_of(self._tokenizer)
        self._model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._offset = float(getattr(model, "offset", 0.0))
        self.has_logits = not isinstance(model, ImplicitReward)
        self._encoding = threading.Lock()  # tokenizers change their settings while they encode
        self._queue: queue.Queue[_Asked | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"scores of {folder.name}", daemon=True)
        self._thread.start()

    def submit(self, messages: Sequence[Mapping[str, str]], response: str) -> Future[Score]:
        """`messages`: the prompt, {"role": …, "content": …}. UserError (3) for what the model cannot hold."""
        asked = _Asked(self._text([Turn(each["role"], each["content"]) for each in messages], response), Future())
        self._queue.put(asked)
        return asked.future

    def close(self) -> None:
        """After what was asked for before."""
        self._queue.put(None)
        self._thread.join()

    def _text(self, prompt: Sequence[Turn], response: str) -> Text:
        with self._encoding:
            ids = self._chat.encode_response(prompt, response)
            before = len(self._chat.encode_prompt(prompt)) if isinstance(self._model, ImplicitReward) else 0
        limit = positions(self._model.config)
        if limit is not None and len(ids) > limit:
            raise UserError(f"{len(ids)} tokens, and the model has {limit} positions", 3)
        return Text(0, ids, before)

    def _run(self) -> None:
        while asked := self._next():
            try:
                values = score_texts(
                    self._model, self._tokenizer.pad_token_id, [each.text for each in asked], MOST_AT_ONCE, "float32"
                )
            except Exception as error:  # noqa: BLE001  those who wait are told
                log.error("%s could not score: %s", self.folder, type(error).__name__)
                _tell(asked, error)
            else:
                _tell(asked, [Score(value, value + self._offset) for value in values])

    def _next(self) -> list[_Asked]:
        """All that waits, as far as one batch takes it; nothing at the end."""
        first = self._queue.get()
        asked = [] if first is None else [first]
        while asked and len(asked) < MOST_AT_ONCE and not self._queue.empty():
            following = self._queue.get()
            if following is None:
                self._queue.put(None)
                break
            asked.append(following)
        return asked


def _tell(asked: Sequence[_Asked], found: Sequence[Score] | Exception) -> None:
    for n, each in enumerate(asked):
        try:
            if isinstance(found, Exception):
                each.future.set_exception(found)
            elif not math.isfinite(found[n].logit):
                each.future.set_exception(ArithmeticError(f"the score is {found[n].logit}"))
            else:
                each.future.set_result(found[n])
        except InvalidStateError:  # cancelled: nobody waits
            pass
