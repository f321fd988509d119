from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import binom, spearmanr

from rlhf.evaluation.agreement import agreement
from rlhf.evaluation.ranked_lists import ranked_lists


def test_mcnemar_by_hand() -> None:
    a = np.array([1.0] * 9 + [-1.0] * 3 + [1.0, -1.0, 0.0])
    b = np.array([-1.0] * 9 + [1.0] * 3 + [1.0, -1.0, 1.0])
    found = agreement(a, b, np.arange(15))
    assert (found["only_a"], found["only_b"]) == (9, 3)
    assert found["mcnemar_p"] == pytest.approx(2 * binom.cdf(3, 12, 0.5))  # two-sided, of 12 discordant pairs
    assert found["difference"].value == pytest.approx((9 - 3 - 0.5) / 15)
    assert found["same_preference"].value == pytest.approx(2 / 15)


def test_rank_correlation_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=60)
    b = (a + rng.normal(size=60)).round(1)  # with ties
    found = agreement(a, b, np.arange(60))["rank_correlation"]
    assert found.value == pytest.approx(spearmanr(a, b)[0])
    assert found.low < found.value < found.high


def test_models_that_agree_in_all() -> None:
    a = np.array([1.0, -1.0, 2.0])
    found = agreement(a, a, np.arange(3))
    assert (found["mcnemar_p"], found["same_preference"].value, found["rank_correlation"].value) == (1.0, 1.0, 1.0)
    assert "rank_correlation" not in agreement(np.zeros(3), a, np.arange(3))


def lists(*entries: tuple[list[float], list[float]]) -> Iterator[dict]:
    for number, (scores, judged) in enumerate(entries):
        yield {"form": "list", "scores": scores, "judged": judged, "prompt": str(number)}
    yield {"form": "pair", "scores": [1.0, 0.0], "prompt": "p"}


def test_lists_are_ranked_within_the_prompt() -> None:
    found = ranked_lists(lists(([1, 2, 3], [10, 20, 30]), ([1, 2, 3], [2, 1, 3]), ([3, 1, 2], [1, 3, 2])))
    # Spearman 1 - 6 Σd²/(n(n² - 1)): 1, ½ and -1; Kendall (concordant - discordant)/3: 1, ⅓ and -1
    assert found["spearman"].value == pytest.approx(0.5 / 3)  # type: ignore[union-attr]
    assert found["kendall"].value == pytest.approx(1 / 9)  # type: ignore[union-attr]
    assert found["best_is_best"].value == pytest.approx(2 / 3)  # type: ignore[union-attr]


def test_lists_without_an_order_are_left_out() -> None:
    found = ranked_lists(lists(([1, 2], [1, 2]), ([1, 1], [1, 2]), ([1, 2], [3, 3])))
    assert found["left_out"] == 2
    assert found["spearman"].n == 1  # type: ignore[union-attr]
    assert ranked_lists(lists()) == {}
