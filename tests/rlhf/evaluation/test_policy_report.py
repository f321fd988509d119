"""The policy report on answers whose every figure can be counted by hand."""

import dataclasses

import pytest

from reward_data import Message, Prompt
from reward_data.records import Tag
from rlhf.evaluation.policy_report import HeldOutResponses, distinct_bigrams, gain, policy_report, values_by_prompt
from rlhf.evaluation.statistics import bootstrap_mean, wilson

SCORES: dict[str, list[float]] = {"gold": [0.5, 1.0, 0.0], "helpfulness": [1, 2, 3]}
ANSWERS = HeldOutResponses(
    texts=["the cat sat", "ha ha ha", "yes"],
    lengths=[4, 8, 3],
    finished=[True, False, True],
    scores=SCORES,
    kl=[0.5, 1.0, 1.5],
    flagged=[True, False, True],
)


def prompts(*texts, tag: Tag = "helpful"):
    return [Prompt((Message("user", text),), tag, "p.jsonl:1") for text in texts]


ABC = prompts("a", "b", "c")


def report(to=ABC, **changes):
    return policy_report(dataclasses.replace(ANSWERS, **changes), to)


def test_every_score_has_its_mean():
    assert report()["gold"].value == 0.5 and report()["helpfulness"].value == 2.0
    assert report()["gold"].low < 0.5 < report()["gold"].high


def test_length_and_kl_are_means():
    assert report()["length"].value == 5.0
    assert report()["kl"].value == 1.0


def test_eos_rate_has_wilsons_interval():
    assert report()["eos_rate"] == wilson(2, 3)


def test_flagged_answers_are_counted_among_the_prompts_of_each_tag():
    got = report([*prompts("a", "b"), *prompts("c", tag="safety")])
    assert got["flagged.helpful"] == wilson(1, 2)
    assert got["flagged.safety"] == wilson(1, 1)
    assert "flagged.safety" not in report()


def test_without_a_safety_model_nothing_is_flagged():
    assert not any("flagged" in name for name in report(flagged=None))


def test_a_score_that_failed_is_in_no_mean():
    got = report(scores={"some": [2.0, None, 5.0], "none": [None] * 3})
    assert got["some"] == bootstrap_mean([2.0, 5.0], ["user: a", "user: c"])
    assert "none" not in got


def test_a_gain_needs_both_scores():
    after = dataclasses.replace(ANSWERS, scores={"x": [2.0, None, 5.0, 7.0], "y": [1.0, None, 1.0, 1.0]})
    before = dataclasses.replace(ANSWERS, scores={"x": [1.5, 1.0, None, 4.0], "y": [None, 1.0, None, None]})
    got = gain(after, before, prompts("a", "b", "c", "d"))
    assert got["x"] == bootstrap_mean([0.5, 3.0], ["user: a", "user: d"])
    assert "y" not in got


def repeated(times):
    """Every answer so often, to prompts that differ in case and spaces alone."""
    own = vars(ANSWERS)
    scores = {name: values * times for name, values in SCORES.items()}
    many = dataclasses.replace(ANSWERS, **{n: own[n] * times for n in own if n != "scores"}, scores=scores)
    return many, [
        p for n in range(times) for p in prompts(*(" " * n + (text.upper() if n % 2 else text) for text in "abc"))
    ]


def test_answers_to_prompts_that_repeat_tell_no_more_than_one_of_them():
    """Ten times the same three answers: the intervals stay as wide as those of three."""
    many, asked = repeated(10)
    once, often = report(), policy_report(many, asked)
    assert once.keys() == often.keys()
    for name in ("gold", "helpfulness", "kl", "length", "distinct_2"):
        width = often[name].high - often[name].low
        assert width == pytest.approx(once[name].high - once[name].low, rel=0.15), name
    assert often["eos_rate"].high - often["eos_rate"].low > 0.5
    assert often["flagged.helpful"].high - often["flagged.helpful"].low > 0.5


def test_a_gain_is_clustered_too():
    many, asked = repeated(10)
    zero = dataclasses.replace(many, scores={name: [0.0] * 30 for name in many.scores})
    assert gain(many, zero, asked)["gold"] == bootstrap_mean(SCORES["gold"] * 10, list("abc") * 10)


def test_distinct_2_is_the_mean_over_answers_that_have_bigrams():
    distinct = report()["distinct_2"]
    assert distinct.value == pytest.approx((1.0 + 0.5) / 2)
    assert distinct.n == 2


def test_without_bigrams_there_is_no_distinct_2():
    assert "distinct_2" not in report(texts=["yes", "", "no"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("", None), ("one", None), ("one two", 1.0), ("a a a a a", 0.25), ("a b a b a", 0.5), ("a\n b  a", 1.0)],
)
def test_distinct_bigrams_by_hand(answer, expected):
    assert distinct_bigrams(answer) == expected


def test_values_by_prompt_are_those_that_the_report_is_the_mean_of():
    values = values_by_prompt(ANSWERS, [*prompts("a", "b"), *prompts("c", tag="safety")])
    assert values["gold"] == [0.5, 1.0, 0.0] and values["length"] == [4, 8, 3]
    assert values["eos_rate"] == [1.0, 0.0, 1.0]
    assert values["flagged.helpful"] == [1.0, 0.0, None] and values["flagged.safety"] == [None, None, 1.0]
    assert values["distinct_2"] == [1.0, 0.5, None]
