"""Alarms sound past their limits, at them they are silent, and what is not finite stops the run."""

from __future__ import annotations

import math

import pytest

from rlhf.config import AlarmConfig
from rlhf.errors import UserError
from rlhf.ppo import alarms
from rlhf.ppo.alarms import Alarm

LIMITS = AlarmConfig(
    kl_max=10,
    eos_rate_min=0.05,
    entropy_ratio_min=0.25,
    rollout_logprob_diff_max=0.5,
    reward_failed_fraction_max=0.2,
)
AT_THE_LIMITS = {"ppo/kl": 10.0, "ppo/eos_rate": 0.05, "ppo/entropy": 0.5, "ppo/rollout_logprob_diff_max": 0.5}
AT_THE_LIMITS |= {"ppo/rollout_logprob_diff_mean": 0.5, "ppo/staleness": 0.0, "ppo/reward_failed_fraction": 0.2}
FIRST_ENTROPY = 2.0


def sounding(**changed: float) -> list[Alarm]:
    metrics = AT_THE_LIMITS | {f"ppo/{name}": value for name, value in changed.items()}
    return list(alarms.sounding(metrics, FIRST_ENTROPY, LIMITS))


def test_a_figure_at_its_limit_is_silent():
    assert sounding() == []


@pytest.mark.parametrize(
    ("name", "figure", "value"),
    [
        ("kl", "kl", 10.1),
        ("eos_rate", "eos_rate", 0.049),
        ("entropy", "entropy", 0.49),
        ("rollout_logprob_diff", "rollout_logprob_diff_max", 0.51),
        ("reward_failed_fraction", "reward_failed_fraction", 0.21),
    ],
)
def test_a_figure_past_its_limit_sounds_alone_and_names_the_setting(name, figure, value):
    (alarm,) = sounding(**{figure: value})
    assert alarm.name == name
    (limit,) = set(AlarmConfig.model_fields) & set(alarm.text.replace("(", ".").replace(")", ".").split("."))
    assert limit.startswith(figure.removesuffix("_max"))


def test_answers_of_an_older_policy_may_differ_at_a_token_but_not_at_every_one():
    assert sounding(staleness=1.0, rollout_logprob_diff_max=9.0) == []
    (alarm,) = sounding(staleness=1.0, rollout_logprob_diff_mean=0.51)
    assert alarm.name == "rollout_logprob_diff" and "rollout_logprob_diff_mean" in alarm.text
    assert sounding(rollout_logprob_diff_mean=0.51) == []


def test_several_can_sound_at_once():
    assert {alarm.name for alarm in sounding(kl=50.0, entropy=0.0)} == {"kl", "entropy"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_the_run_and_is_named(value):
    metrics = {"ppo/kl": 1.0, "ppo/value_loss": value, "perf/seconds_sync": 0.1}
    with pytest.raises(UserError, match=r"iteration 7: ppo/value_loss is (nan|inf|-inf)\. .*ppo\.optim\.lr") as caught:
        alarms.refuse_not_finite(metrics, 7)
    assert caught.value.exit_code == 6


def test_finite_figures_pass():
    assert alarms.refuse_not_finite({"ppo/kl": 1e30, "ppo/reward": -1e30}, 7) is None


def test_an_alarm_is_kept_once_with_its_first_text_and_how_often_it_sounded():
    known = alarms.noted([], [Alarm("kl", "over 10")], 3)
    known = alarms.noted(known, [], 4)
    known = alarms.noted(known, [Alarm("kl", "over 20"), Alarm("entropy", "low")], 5)
    assert [(e["name"], e["text"], e["first"], e["iterations"]) for e in known] == [
        ("kl", "over 10", 3, 2),
        ("entropy", "low", 5, 1),
    ]
    assert alarms.line(known[0]) == "iteration 3: over 10"
