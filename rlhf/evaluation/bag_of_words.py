"""A floor for reward models: a linear Bradley-Terry model of words, fitted on pairs. It reads no order and no prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from rlhf.errors import UserError

FEATURES = 2**18  # words and pairs of words are hashed, so that no vocabulary is kept
BATCH = 1024  # pairs whose words are counted at once


class BagOfWords:
    def __init__(self) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._counts = HashingVectorizer(
            n_features=FEATURES, ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]", norm="l2", alternate_sign=False
        )
        self._weights_F = np.zeros(FEATURES)

    def fit(self, pairs: Iterable[tuple[str, str]]) -> BagOfWords:
        """Logistic regression on the differences of counts, without intercept: P(chosen over rejected). UserError (3)
        without pairs.
        """
        from scipy.sparse import vstack
        from sklearn.linear_model import LogisticRegression

        parts, pairs = [], iter(pairs)
        while batch := list(islice(pairs, BATCH)):
            chosen, rejected = zip(*batch, strict=True)
            parts.append(self._count(chosen) - self._count(rejected))
        if not parts:
            raise UserError("the bag of words has no pair to be fitted on", 3)
        differences: Any = vstack(parts)
        labels = np.repeat([1, 0], differences.shape[0])  # both orders, so that there are two classes
        model = LogisticRegression(fit_intercept=False, max_iter=200).fit(vstack([differences, -differences]), labels)
        self._weights_F = np.asarray(model.coef_)[0]
        return self

    def score(self, texts: Sequence[str]) -> list[float]:
        return (self._count(texts) @ self._weights_F).tolist()

    def _count(self, texts: Sequence[str]) -> Any:
        """counts_BF, sparse, each row of length 1."""
        return self._counts.transform(texts)
