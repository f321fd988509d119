"""Scored pairs as columns: some fifty bytes a pair, however long its texts."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Labels(NamedTuple):
    """A word for each pair: numbers, and the words that they stand for."""

    codes_N: np.ndarray
    words: list[str]

    def groups(self, order: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """The mask of each word that occurs: first those of `order`, then the others by the alphabet."""
        others = sorted(set(self.words) - set(order))
        masks = {word: self.codes_N == self.words.index(word) for word in [*order, *others] if word in self.words}
        return {word: mask_N for word, mask_N in masks.items() if mask_N.any()}


@dataclass(frozen=True)
class Pairs:
    rows_N: np.ndarray  # number of the row among all data
    chosen_N: np.ndarray  # scores, float64
    rejected_N: np.ndarray
    chosen_length_N: np.ndarray  # characters
    rejected_length_N: np.ndarray
    prompts_N: np.ndarray  # pairs of equal numbers share a prompt
    turns_N: np.ndarray  # of the user, in the prompt
    ratings: Labels
    tags: Labels
    files: Labels
    subsets: Labels

    def __len__(self) -> int:
        return len(self.chosen_N)

    @property
    def margin_N(self) -> np.ndarray:
        """Score of the chosen response less that of the rejected one."""
        return self.chosen_N - self.rejected_N

    @property
    def log_length_ratio_N(self) -> np.ndarray:
        """log of chosen length / rejected length: above 0 where the chosen response is longer."""
        return np.log(self.chosen_length_N) - np.log(self.rejected_length_N)


WORDS = ("rating", "tag", "file", "subset")


def pairs_of(lines: Iterable[Mapping[str, Any]]) -> Pairs:
    """The pairs among scored items, as `launch.evaluate.scores` writes them."""
    numbers, prompts, codes = array("d"), array("q"), array("i")
    words: list[dict[str, int]] = [{} for _ in WORDS]
    for line in lines:
        if line["form"] == "pair":
            numbers.extend((*line["scores"], *line["lengths"], line["turns"], line["row"]))
            prompts.append(int(line["prompt"], 16))
            codes.extend(known.setdefault(line[key], len(known)) for key, known in zip(WORDS, words, strict=True))
    numbers_N6 = np.frombuffer(numbers, dtype=np.float64).reshape(-1, 6)
    codes_NL = np.frombuffer(codes, dtype=np.int32).reshape(-1, len(WORDS))
    ratings, tags, files, subsets = (
        Labels(codes_N, list(known)) for codes_N, known in zip(codes_NL.T, words, strict=True)
    )
    return Pairs(
        rows_N=numbers_N6[:, 5].astype(np.int64),
        chosen_N=numbers_N6[:, 0],
        rejected_N=numbers_N6[:, 1],
        chosen_length_N=numbers_N6[:, 2],
        rejected_length_N=numbers_N6[:, 3],
        prompts_N=np.frombuffer(prompts, dtype=np.int64),
        turns_N=numbers_N6[:, 4],
        ratings=ratings,
        tags=tags,
        files=files,
        subsets=subsets,
    )
