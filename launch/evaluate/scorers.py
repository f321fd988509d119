"""What gives every response of an item a score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from launch.evaluate.checks import check
from launch.score import load_reward_model, score_texts, texts_for
from rlhf.evaluation.bag_of_words import BagOfWords
from rlhf.evaluation.items import Item
from rlhf.models import load_tokenizer


class Scored(NamedTuple):
    scores: dict[int, list[float]]  # number of the item → score of each response
    unfit: list[str]  # why the others have none


class Scorer(Protocol):
    def map(self, windows: Iterable[Sequence[Item]]) -> Iterator[Scored]:
        """The scores of each window, in order. It may ask for a few windows before it gives the first one's scores."""
        ...


class RewardScorer(Scorer, Protocol):
    def check(self, items: Sequence[Item]) -> dict[str, Any]:
        """Whether the model reads what it should, see `launch.evaluate.checks`."""
        ...


class ModelScorer:
    def __init__(self, folder: Path, batch_size: int, precision: str) -> None:
        self.tokenizer, model = load_tokenizer(folder), load_reward_model(folder)
        self.model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._batch_size, self._precision = batch_size, precision

    def check(self, items: Sequence[Item]) -> dict[str, Any]:
        return check(self.model, self.tokenizer, items, self._precision)

    def map(self, windows: Iterable[Sequence[Item]]) -> Iterator[Scored]:
        return map(self.score, windows)

    def score(self, items: Sequence[Item]) -> Scored:
        texts, unfit = texts_for(self.model, self.tokenizer, items)
        values = score_texts(self.model, self.tokenizer.pad_token_id, texts, self._batch_size, self._precision)
        scores: dict[int, list[float]] = {}
        for text, value in zip(texts, values, strict=True):
            scores.setdefault(text.row, []).append(value)
        return Scored(scores, unfit)


class WordScorer:
    def __init__(self, model: BagOfWords) -> None:
        self._model = model

    def map(self, windows: Iterable[Sequence[Item]]) -> Iterator[Scored]:
        return map(self.score, windows)

    def score(self, items: Sequence[Item]) -> Scored:
        values = iter(self._model.score([text for item in items for text in item.responses]))
        return Scored({n: [next(values) for _ in item.responses] for n, item in enumerate(items)}, [])
