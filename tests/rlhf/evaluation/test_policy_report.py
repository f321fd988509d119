"""The policy report on three answers whose every figure can be counted by hand."""

import pytest

from rlhf.evaluation.intervals import wilson
from rlhf.evaluation.policy_report import distinct_bigrams, policy_report


def report(answers=("the cat sat", "ha ha ha", "yes")):
    return policy_report(answers, {"gold": [0.5, 1.0, 0.0], "helpfulness": [1, 2, 3]}, [True, False, True], [4, 8, 3])


def test_every_score_has_its_mean():
    assert report()["gold"].value == 0.5 and report()["helpfulness"].value == 2.0
    assert report()["gold"].low < 0.5 < report()["gold"].high


def test_length_is_the_mean_number_of_tokens():
    assert report()["length"].value == 5.0


def test_eos_share_has_wilsons_interval():
    assert report()["eos_share"] == wilson(2, 3)


def test_distinct_2_is_the_mean_over_answers_that_have_bigrams():
    distinct = report()["distinct_2"]
    assert distinct.value == pytest.approx((1.0 + 0.5) / 2)
    assert distinct.n == 2


def test_without_bigrams_there_is_no_distinct_2():
    assert set(report(("yes", "", "no"))) == {"gold", "helpfulness", "length", "eos_share"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("", None), ("one", None), ("one two", 1.0), ("a a a a a", 0.25), ("a b a b a", 0.5), ("a\n b  a", 1.0)],
)
def test_distinct_bigrams_by_hand(answer, expected):
    assert distinct_bigrams(answer) == expected
