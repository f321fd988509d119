"""Differences of two runs, item by item and seed by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf.evaluation.comparison import difference_by_item, difference_by_seed, not_paired, over_seeds


def rows(values: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """`repeats` items to each prompt, all with the prompt's value."""
    return [
        {"item": f"{prompt}/{n}", "prompt": str(prompt), "gold": float(value)}
        for prompt, value in enumerate(values)
        for n in range(repeats)
    ]


def test_items_of_one_prompt_tell_no_more_than_one_of_them() -> None:
    """Were they independent, four times as many would halve the interval."""
    a, b = np.random.default_rng(0).normal(size=(2, 80))
    widths = []
    for repeats in (1, 4):
        found = difference_by_item(rows(a, repeats), rows(b, repeats), "gold")
        assert found is not None and found.n == 80 * repeats
        assert found.value == pytest.approx((a - b).mean())
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_a_metric_that_one_run_lacks_has_no_difference() -> None:
    a = rows(np.ones(3), 1)
    assert not_paired(a, a) is None
    assert difference_by_item(a, [{"item": row["item"], "prompt": row["prompt"]} for row in a], "gold") is None


def test_one_seed_has_no_spread() -> None:
    assert over_seeds({0: 0.5}) is None
    assert difference_by_seed({0: 0.5, 1: 0.6}, {1: 0.5, 2: 0.4}) is None
