"""The reward report on six pairs whose every figure can be counted by hand."""

import json
import math

import pytest

from rlhf.evaluation.reward_report import calibration, reward_report
from rlhf.evaluation.statistics import wilson

# chosen score, rejected score, rating, tag, prompt, chosen length, rejected length
PAIRS = [
    (2.0, 1.0, "significantly", "helpful", "a", 9, 5),  # right, and the chosen one is longer
    (3.0, 0.0, "significantly", "helpful", "b", 9, 5),  # right, longer
    (0.0, 1.0, "better", "helpful", "c", 5, 9),  # wrong, and prefers the longer one
    (1.0, 1.0, "unrated", "safety", "d", 5, 5),  # a tie of scores and of lengths
    (5.0, 1.0, "unrated", "safety", "e", 5, 9),  # right, and shorter
    (0.0, 0.2, "better", "safety", "f", 5, 9),  # wrong, and prefers the longer one
]


def report(pairs=PAIRS):
    chosen, rejected, ratings, tags, prompts, chosen_lengths, rejected_lengths = map(list, zip(*pairs, strict=True))
    return reward_report(chosen, rejected, ratings, tags, prompts, chosen_lengths, rejected_lengths)


def test_accuracy_counts_ties_half():
    assert report()["accuracy"] == wilson(3.5, 6).as_dict()


def test_ties_are_also_shown():
    assert report()["ties"] == wilson(1, 6).as_dict()


def test_accuracy_by_rating_has_the_ratings_that_occur_from_clear_to_unclear():
    by_rating = report()["by_rating"]
    assert list(by_rating) == ["significantly", "better", "unrated"]
    assert by_rating["significantly"] == wilson(2, 2).as_dict()
    assert by_rating["better"] == wilson(0, 2).as_dict()
    assert by_rating["unrated"] == wilson(1.5, 2).as_dict()


def test_accuracy_by_tag():
    by_tag = report()["by_tag"]
    assert by_tag == {"helpful": wilson(2, 3).as_dict(), "safety": wilson(1.5, 3).as_dict()}


def test_the_longer_side_as_a_baseline():
    length = report()["length"]
    assert length["chosen_is_longer"] == wilson(2.5, 6).as_dict()
    assert length["model_prefers_longer"] == wilson(4, 5).as_dict()


def test_without_unequal_lengths_there_is_no_preference_to_report():
    assert "model_prefers_longer" not in report([PAIRS[3]])["length"]


def test_pairs_of_one_prompt_are_clustered():
    pairs = [(*pair[:4], prompt, *pair[5:]) for pair, prompt in zip(PAIRS, "xxyyzz", strict=True)]
    found = report(pairs)["accuracy"]
    # outcomes 1 1, 0 ½, 1 0: p = 7/12; variance 3/2 · (25 + 16 + 1)/36 / 36, so 5 effective observations; t of 3 clusters
    p, t = 7 / 12, 4.302653
    for limit in (found["low"], found["high"]):  # Wilson's limits are where (p - π)² = t² π(1 - π)/n
        assert (p - limit) ** 2 == pytest.approx(t**2 * limit * (1 - limit) / 5, rel=1e-5)
    assert found["low"] < p < found["high"]
    assert found["n"] == 6


def test_calibration_bins_hold_what_the_gaps_promise():
    bins = report()["calibration"]
    sigmoid = [1 / (1 + math.exp(-gap)) for gap in (0.0, 0.2, 1.0, 3.0, 4.0)]
    assert [(b["low"], b["high"]) for b in bins] == [(0.5, 0.6), (0.7, 0.8), (0.9, 1.0)]
    assert bins[0]["predicted"] == pytest.approx((sigmoid[0] + sigmoid[1]) / 2)
    assert bins[0]["observed"] == wilson(0.5, 2).as_dict()  # the tie and a wrong one
    assert bins[1]["predicted"] == pytest.approx(sigmoid[2])
    assert bins[1]["observed"] == wilson(1, 2).as_dict()  # gap 1, once right and once wrong
    assert bins[2]["predicted"] == pytest.approx((sigmoid[3] + sigmoid[4]) / 2)
    assert bins[2]["observed"] == wilson(2, 2).as_dict()


def test_huge_gaps_are_certain_and_do_not_overflow():
    (only,) = calibration([1e6, -1e6], [-1e6, 1e6], ["a", "b"])
    assert only["predicted"] == 1.0 and only["observed"]["value"] == 0.5


def test_the_report_is_strict_json():
    assert json.loads(json.dumps(report(), allow_nan=False)) == report()


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        reward_report([1.0, 2.0], [0.0], ["better"] * 2, ["helpful"] * 2, ["a", "b"], [1, 2], [1, 2])
