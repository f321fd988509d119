"""One look at the store: metrics over time, drift, and what the rules say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.evaluation.drift import Drift
from rlhf.evaluation.statistics import Estimate
from rlhf.serving.store import Store
from rlhf.serving.watch.baseline import Baseline
from rlhf.serving.watch.records import Alarm, Observed, newest_alarms, observed
from rlhf.serving.watch.rules import KS, PSI, Rule
from rlhf.serving.watch.series import Bucket, metrics_of, series

NEWEST_ALARMS = 10
FEWEST = 5  # people or conversations behind a mean that rings: that all of them are beyond a value by chance is 1 in 32


@dataclass(frozen=True)
class Look:
    buckets: Sequence[Bucket]
    whole: Mapping[str, Estimate]
    drifts: Mapping[str, Drift]
    alarms: Sequence[Alarm]
    """The newest, also those that have ended."""
    found: Mapping[str, Estimate]
    """By the name of the rule."""


def look(
    store: Store, now: float, span: float, count: int, baseline: Baseline | None = None, rules: Sequence[Rule] = ()
) -> Look:
    """At the last `span` seconds in `count` buckets, and at each rule's window."""
    rows = observed(store, now - max([span, *(rule.window for rule in rules)]))
    shown = [row for row in rows if row.created >= now - span]
    return Look(
        buckets=series(shown, now - span, now, count),
        whole=metrics_of(shown),
        drifts=baseline.drifts(shown) if baseline else {},
        alarms=newest_alarms(store, NEWEST_ALARMS),
        found=_of_rules(rows, now, baseline, rules),
    )


def _of_rules(
    rows: Sequence[Observed], now: float, baseline: Baseline | None, rules: Sequence[Rule]
) -> dict[str, Estimate]:
    found = {}
    for window in {rule.window for rule in rules}:
        inside = [row for row in rows if row.created >= now - window]
        known = metrics_of(inside, FEWEST) | (_of_drifts(baseline.drifts(inside)) if baseline else {})
        if inside:
            found |= {rule.name: known[rule.metric] for rule in rules if rule.window == window and rule.metric in known}
    return found


def _of_drifts(drifts: Mapping[str, Drift]) -> dict[str, Estimate]:
    """An index that chance alone explains is surely above nothing."""
    found = {}
    for name, one in drifts.items():
        found[PSI + name] = Estimate(one.psi, one.psi if one.psi > one.chance else 0.0, one.psi, one.n)
        found[KS + name] = Estimate(one.p, one.p, one.p, one.n)
    return found
