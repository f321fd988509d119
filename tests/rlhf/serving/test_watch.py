"""What is said of a served model over time, from a store that is worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from rlhf.errors import UserError
from rlhf.evaluation.statistics import Estimate
from rlhf.serving.store import Exchange, Score, Store, Vote
from rlhf.serving.watch import baseline, rules
from rlhf.serving.watch.records import Alarm, Observed, begin_alarm, end_alarm, newest_alarms, observed, on
from rlhf.serving.watch.rules import Rule, changes
from rlhf.serving.watch.series import metrics_of, series
from rlhf.serving.watch.spans import seconds, shown


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/feedback.db")


def exchange(number: int, **more: Any) -> Exchange:
    usual: dict[str, Any] = {
        "id": f"r{number}",
        "kind": "chat",
        "model": "tiny",
        "digest": None,
        "messages": [{"role": "user", "content": f"question {number}"}],
        "response": f"answer {number}",
        "finish": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 10,
        "seconds": 2.0,
        "sampling": {},
        "first_token_s": 0.5,
        "created": float(number),
    }
    return Exchange(**usual | more)


def one(number: int, cluster: str = "", **more: Any) -> Observed:
    usual: dict[str, Any] = {"refused": False, "length": 10, "seconds": 2.0, "first_token_s": 0.5}
    return Observed(id=f"r{number}", created=float(number), cluster=cluster or f"c{number}", **usual | more)


# --- what the store knows


def test_a_response_is_unsafe_by_the_raw_logit(store: Store) -> None:
    """σ(logit) < .15: the score, from which a mean is subtracted, says something else."""
    logits = {"r1": math.log(0.149 / 0.851), "r2": math.log(0.151 / 0.849), "r3": 9.0}
    store.add([exchange(n) for n in (1, 2, 3, 4)])
    store.add_scores([Score(key, "safety", logit - 4, logit, "s") for key, logit in logits.items()])
    store.add_scores([Score("r4", "helpful", -9.0, -9.0, "h")])
    assert [row.unsafe for row in observed(store, 0)] == [True, False, False, None]


def test_scores_are_of_the_newest_reward_model(store: Store) -> None:
    store.add([exchange(n) for n in (1, 2, 3)])
    store.add_scores([Score(f"r{n}", "helpful", n, n, "old", created=n) for n in (1, 2, 3)])
    store.add_scores(
        [Score("r1", "helpful", 10, 10, "new", created=8), Score("r3", "helpful", None, None, "new", created=9)]
    )
    assert [row.scores for row in observed(store, 0)] == [{"helpful": 10}, {}, {}]


def test_clusters_are_people_else_conversations(store: Store) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question 2"}]
    later = [*turns, {"role": "assistant", "content": "answer 2"}, {"role": "user", "content": "and now?"}]
    store.add(
        [exchange(1, user="ann"), exchange(2, user="ann"), exchange(3, messages=turns), exchange(4, messages=later)]
    )
    store.add([exchange(5), exchange(6, user="bob")])
    a, b, c, d, e, f = (row.cluster for row in observed(store, 0))
    assert (a == b, c == d, len({a, c, e, f})) == (True, True, 4)


def test_refusals_votes_and_times_are_read(store: Store) -> None:
    store.add([exchange(1, response="I'm sorry, but I cannot."), exchange(2, user="ann"), exchange(3)])
    store.add([Vote("r2", thumb="down", user="ann", created=4), Vote("r2", thumb="up", user="ann", created=5)])
    store.add(
        [Vote("r2", thumb="down", created=6), Vote("r3", "r2", "first", "better", created=7), Vote("r3", edit="x")]
    )
    rows = observed(store, 1)
    assert [row.refused for row in rows] == [True, False, False]
    assert [(sorted(row.thumbs), row.compared) for row in rows] == [([], 0), ([False, True], 0), ([], 1)]
    assert [row.id for row in observed(store, 2.5)] == ["r3"]
    assert (rows[0].length, rows[0].seconds, rows[0].first_token_s) == (10, 2.0, 0.5)


# --- metrics


def test_metrics_by_hand() -> None:
    rows = [
        one(1, length=10, seconds=1.0, scores={"helpful": 1.0, "safety": 2.0}, unsafe=False, thumbs=[True]),
        one(2, length=30, seconds=3.0, scores={"helpful": 3.0}, first_token_s=None, refused=True),
        one(3, length=20, seconds=6.0, first_token_s=1.0, unsafe=True, thumbs=[False, True], compared=1),
    ]
    found = metrics_of(rows)
    expected = {
        "responses": 3,
        "reward.helpful": 2,
        "reward.safety": 2,
        "unsafe": 1 / 2,
        "refusals": 1 / 3,
        "length": 20,
        "first_token_s": 0.75,
        "tokens_per_s": 6,
        "thumbs_up": 2 / 3,
        "votes": 4,
    }
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(expected)
    assert list(found) == list(expected)
    z, n, p = 1.959964, 3, 1 / 3  # Wilson 1927
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    assert (found["refusals"].low, found["refusals"].high) == pytest.approx((low, high))


def test_nothing_has_counts_alone() -> None:
    assert {name: found.value for name, found in metrics_of([]).items()} == {"responses": 0, "votes": 0}


def test_intervals_know_of_clusters() -> None:
    """Ten conversations of ten equal responses each tell as much as ten responses."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=10)
    each = [one(n, scores={"r": value}, unsafe=bool(value > 0)) for n, value in enumerate(values)]
    many = [
        one(10 * n + k, f"c{n}", scores={"r": value}, unsafe=bool(value > 0), length=10 + n)
        for n, value in enumerate(values)
        for k in range(10)
    ]
    few, ten = metrics_of(each), metrics_of(many)
    for name in ("reward.r", "unsafe"):
        assert ten[name].value == pytest.approx(few[name].value)
        assert ten[name].high - ten[name].low == pytest.approx(few[name].high - few[name].low, rel=0.35)


def test_the_interval_of_speed_covers_the_truth() -> None:
    """Tokens are drawn, a token takes 0.1 s and each response 1 s more: 20 / 3 tokens a second."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        lengths = rng.integers(1, 40, size=50)
        found = metrics_of([one(n, length=int(k), seconds=0.1 * k + 1) for n, k in enumerate(lengths)])["tokens_per_s"]
        hits += found.low <= 20 / 3 <= found.high
    assert 0.9 < hits / 200 < 0.99


def test_buckets_are_equal_parts_of_the_time() -> None:
    found = series([one(n) for n in (0, 1, 9, 10, 10, 20, 25)], 0, 20, 2)
    assert [(each.start, each.end, each.metrics["responses"].value) for each in found] == [(0, 10, 3), (10, 20, 2)]


# --- rules


RULE: dict[str, Any] = {"metric": "unsafe", "op": ">", "value": 0.1}


@pytest.mark.parametrize(
    ("op", "low", "high", "begins"),
    [(">", 0.11, 0.3, True), (">", 0.09, 0.3, False), ("<", 0.01, 0.09, True), ("<", 0.01, 0.2, False)],
)
def test_an_alarm_begins_where_the_whole_interval_is_beyond(op: str, low: float, high: float, begins: bool) -> None:
    rule = Rule.model_validate(RULE | {"op": op})
    found = {rule.name: Estimate((low + high) / 2, low, high, 9)}
    assert changes([rule], found, {}) == ([rule] if begins else [], [])


@pytest.mark.parametrize(
    ("op", "value", "ends"), [(">", 0.11, False), (">", 0.1, True), ("<", 0.09, False), ("<", 0.1, True)]
)
def test_an_alarm_ends_where_the_estimate_is_back(op: str, value: float, ends: bool) -> None:
    rule = Rule.model_validate(RULE | {"op": op})
    found = {rule.name: Estimate(value, 0.0, 1.0, 9)}
    assert changes([rule], found, {rule.name: True}) == ([], [rule] if ends else [])


def test_an_alarm_begins_once_and_stays_while_nothing_is_known() -> None:
    rule, far = Rule.model_validate(RULE), Estimate(0.5, 0.4, 0.6, 9)
    assert changes([rule], {rule.name: far}, {rule.name: True}) == ([], [])
    assert changes([rule], {}, {rule.name: True}) == ([], [])
    assert changes([rule], {}, {}) == ([], [])


def test_the_store_remembers_alarms(store: Store) -> None:
    for number in (1, 2, 3):
        begin_alarm(store, Alarm(f"rule {number % 2}", 0.5, 0.4, 0.6, 9, began=number))
        if number == 1:
            end_alarm(store, "rule 1", 1.5)
    assert set(on(store)) == {"rule 0", "rule 1"}
    assert [(each.began, each.ended) for each in newest_alarms(store, 2)] == [(3, None), (2, None)]
    end_alarm(store, "rule 1", 4)
    assert [(each.began, each.ended) for each in newest_alarms(store, 9)] == [(3, 4), (2, None), (1, 1.5)]


def test_rules_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "rules:\n- {metric: unsafe, op: '>', value: 0.05, window: 30m}\n- {metric: psi.reward.helpful, op: '>', value: 0.25}\n"
        "webhook: https://example.org/hook\n"
    )
    found = rules.read(file)
    assert [rule.name for rule in found.rules] == ["unsafe > 0.05 in 30m", "psi.reward.helpful > 0.25 in 1h"]
    assert [rule.needs_baseline for rule in found.rules] == [False, True]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules: []", "rules"),
        ("rules: [{metric: reward, op: '>', value: 1}]", "rules.0.metric"),
        ("rules: [{metric: psi.unsafe, op: '>', value: 1}]", "there is no metric psi.unsafe"),
        ("rules: [{metric: unsafe, op: '=', value: 1}]", "rules.0.op"),
        ("rules: [{metric: unsafe, op: '>', value: 1, window: 1 week}]", "rules.0.window"),
        ("rules: [{metric: unsafe, op: '>', value: 1, wndow: 1h}]", "wndow"),
        ("rules: [{metric: unsafe, op: '>', value: .nan}]", "rules.0.value"),
        ("rules: [{metric: unsafe, op: '>', value: 1}]\nwebhook: file:///etc/passwd", "webhook"),
        ("rules: [", "no YAML"),
        ("- 3", "the file"),
    ],
)
def test_wrong_rules_are_told_with_their_place(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(UserError) as wrong:
        rules.read(tmp_path / "rules.yaml")
    assert told in wrong.value.message
    with pytest.raises(UserError) as missing:
        rules.read(tmp_path / "none.yaml")
    assert missing.value.exit_code == 4


def test_times_are_read_and_shown() -> None:
    assert [seconds(text) for text in ("30m", "1h", "1.5h", "7d")] == [1800, 3600, 5400, 604_800]
    assert [shown(span) for span in (1800, 3600, 5400, 604_800, 90)] == ["30m", "1h", "90m", "7d", "90s"]
    for wrong in ("", "h", "-1h", "0h", "1w", "1 h"):
        with pytest.raises(ValueError, match="no time"):
            seconds(wrong)


# --- baseline


def lines(model: str, rewards: list[float], temperature: float = 1.0) -> str:
    rows = [
        {"model": model, "temperature": temperature, "length": 10 + n, "scores": {"helpful": value, "failed": None}}
        for n, value in enumerate(rewards)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def held_out(folder: Path) -> None:
    row = {"item": "a", "prompt": "b", "reward.helpful": 1.0, "length": 5, "sft.length": 9, "kl": 2.0}
    (folder / "held_out.jsonl").write_text(json.dumps(row) + "\n")


def responses(*parts: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "responses.jsonl").write_text("".join(parts))


@pytest.mark.parametrize(
    ("inside", "write", "expected"),
    [
        (
            "",
            responses(lines("ppo", [1.0, 2.0]), lines("ppo", [7.0], 0.5)),
            {"reward.helpful": [1, 2], "length": [10, 11]},
        ),
        (
            "promotion",
            responses(lines("champion", [7.0]), lines("candidate", [1.0])),
            {"reward.helpful": [1], "length": [10]},
        ),
        ("ppo/artifact", held_out, {"reward.helpful": [1], "length": [5]}),
        ("artifact", held_out, {"reward.helpful": [1], "length": [5]}),
    ],
)
def test_a_baseline_is_read(tmp_path: Path, inside: str, write: Callable, expected: dict[str, list[float]]) -> None:
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    write(tmp_path / inside)
    found = baseline.read(tmp_path).values
    assert {name: values for name, values in found.items() if values} == expected


def test_what_is_no_baseline_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as missing:
        baseline.read(tmp_path)
    assert missing.value.exit_code == 4
    responses(lines("a", [1.0]), lines("b", [1.0]))(tmp_path)
    with pytest.raises(UserError, match="a, b"):
        baseline.read(tmp_path)


def test_the_promotion_comes_before_the_held_out_responses(tmp_path: Path) -> None:
    assert baseline.usual(tmp_path) is None
    (tmp_path / "ppo/artifact").mkdir(parents=True)
    held_out(tmp_path / "ppo/artifact")
    assert baseline.usual(tmp_path) == tmp_path / "ppo/artifact"
    (tmp_path / "ppo/promotion").mkdir()
    responses(lines("candidate", [1.0]))(tmp_path / "ppo/promotion")
    assert baseline.usual(tmp_path) == tmp_path / "ppo/promotion"


def test_drift_is_that_of_the_known_values(tmp_path: Path) -> None:
    """The test takes the newest response of each conversation, the index all of them."""
    rng = np.random.default_rng(0)
    there, here = rng.normal(size=300), rng.normal(1, size=200)
    rows = [one(n, f"c{n % 50}", scores={"helpful": value}) for n, value in enumerate(here)]
    found = baseline.Baseline(tmp_path, {"reward.helpful": list(there), "reward.other": [1.0], "length": []}).drifts(
        rows
    )
    assert set(found) == {"reward.helpful"}
    expected: Any = ks_2samp(there, here[150:])
    assert (found["reward.helpful"].ks, found["reward.helpful"].p) == pytest.approx(
        (expected.statistic, expected.pvalue)
    )
    assert (found["reward.helpful"].n, found["reward.helpful"].level) == (200, "much")
