"""Over-optimisation: changes worked by hand with scipy's paired test as a second opinion, and runs made up to have it or not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from rlhf.evaluation.over_optimization import Evaluation, frontier, over_optimization

PROMPTS = list(range(200))


def run(proxy_by_step: list[float], gold_by_step: list[float], seed: int = 0, noise: float = 0.3) -> list[Evaluation]:
    """Evaluations whose mean scores follow the two curves; prompts differ much more than that."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, 3, len(PROMPTS))
    return [
        Evaluation(
            4 * number,
            {
                "reward": list(hard + proxy + rng.normal(0, noise, len(PROMPTS))),
                "gold": list(hard + gold + rng.normal(0, noise, len(PROMPTS))),
                "kl": list(np.full(len(PROMPTS), float(number))),
            },
        )
        for number, (proxy, gold) in enumerate(zip(proxy_by_step, gold_by_step, strict=True))
    ]


def test_half_of_the_prompts_choose_and_the_others_measure() -> None:
    evaluations = run([0, 1, 2, 3, 4], [0, 1, 2, 1.5, 1])
    found = over_optimization(evaluations, PROMPTS, "gold")
    assert (found["from_step"], found["to_step"]) == (8, 16)
    for name, key in (("reward", "proxy"), ("gold", "truth")):
        before, after = (np.array(evaluations[n].values[name])[1::2] for n in (2, 4))
        interval = ttest_rel(after, before).confidence_interval(0.95)
        assert found[key].value == pytest.approx((after - before).mean())
        assert (found[key].low, found[key].high) == pytest.approx((interval.low, interval.high), abs=0.015)
        assert found[key].n == 100
    assert found["shown"] and found["falls"]


@pytest.mark.parametrize(
    ("proxy", "gold", "shown", "falls"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], False, False),  # both rise to the last
        ([0, 1, 2, 3], [0, 1, 1, 0], True, True),
        ([0, 1, 1, 1], [0, 2, 1, 0], False, False),  # the proxy is flat: whatever that is, it is not this
        ([0, 1, 2, 1], [0, 1, 2, 1], False, False),  # both fall
    ],
)
def test_it_is_shown_where_the_proxy_alone_rises(proxy: list, gold: list, shown: bool, falls: bool) -> None:
    found = over_optimization(run(proxy, gold, seed=3), PROMPTS, "gold")
    assert (found["shown"], found["falls"]) == (shown, falls)


def test_luck_is_not_taken_for_a_fall() -> None:
    """The truth is flat and the best of twenty evaluations is best by luck: its mean is no lower afterwards."""
    changes, falls = [], 0
    for seed in range(300):
        found = over_optimization(run(list(np.arange(20) / 5), [0.0] * 20, seed, noise=2), PROMPTS, "gold")
        if "truth" in found:
            changes.append(found["truth"].value)
            falls += found["falls"]
    assert abs(float(np.mean(changes))) < 3 * np.std(changes) / np.sqrt(len(changes))
    assert falls / len(changes) < 0.025 + 3 * np.sqrt(0.025 * 0.975 / len(changes))


def test_copies_of_a_prompt_are_on_one_side() -> None:
    first, last = (
        Evaluation(step, {"reward": [0.0, 0.0, step, step], "gold": [3.0 - step] * 2 + [1.0 - step] * 2})
        for step in (0, 1)
    )
    found = over_optimization([first, last], ["a", "a", "b", "b"], "gold")
    assert found["proxy"].value == 1 and found["proxy"].n == 2


def test_failed_scores_are_left_out_on_both_sides() -> None:
    first, middle, last = run([0, 1, 2], [0, 1, 0])
    failed: list[float | None] = [None if row == 3 else value for row, value in enumerate(last.values["reward"])]
    found = over_optimization(
        [first, middle, Evaluation(last.step, {**last.values, "reward": failed})], PROMPTS, "gold"
    )
    assert (found["proxy"].n, found["truth"].n) == (99, 100)


def test_the_frontier_has_the_means_of_every_step() -> None:
    evaluations = run([0, 1, 2], [0, 1, 1])
    points = frontier(evaluations, PROMPTS)
    assert [point["step"] for point in points] == [0, 4, 8]
    assert [point["kl"].value for point in points] == [0, 1, 2]
    assert points[2]["reward"].value == pytest.approx(np.mean(np.asarray(evaluations[2].values["reward"], float)))
