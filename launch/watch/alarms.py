"""Where alarms go: the store, the log, a webhook, MLflow. None of them stops the watch, and none gets a text."""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlhf.config import without_secrets
from rlhf.evaluation.statistics import Estimate
from rlhf.serving.store import Store
from rlhf.serving.watch.records import Alarm, begin_alarm, end_alarm, on
from rlhf.serving.watch.rules import Rule, changes
from rlhf.serving.watch.spans import shown
from rlhf.tracking import Tracker

log = logging.getLogger(__name__)

TRIES, PAUSE_S, PATIENCE_S = 3, 1.0, 5.0
State = Literal["began", "ended"]


def ring(
    store: Store,
    rules: Sequence[Rule],
    found: Mapping[str, Estimate],
    now: float,
    webhook: str | None = None,
    tracker: Tracker | None = None,
) -> list[str]:
    """What has begun or ended since the last look, in words. The store remembers what rings, also over a restart."""
    begun, ended = changes(list(rules), found, on(store))
    for rule in begun:
        one = found[rule.name]
        begin_alarm(store, Alarm(rule.name, one.value, one.low, one.high, one.n, now))
    for rule in ended:
        end_alarm(store, rule.name, now)
    events: list[tuple[Rule, State]] = [*((rule, "began") for rule in begun), *((rule, "ended") for rule in ended)]
    for rule, state in events:
        log.warning(words(rule, state, found[rule.name]))
        if webhook:
            post(webhook, payload(rule, state, found[rule.name], now))
    if tracker:
        track(tracker, rules, found, events, now)
    return [words(rule, state, found[rule.name]) for rule, state in events]


def words(rule: Rule, state: State, found: Estimate) -> str:
    return f"alarm {state}: {rule.name}: {found.value:.4g} [{found.low:.4g}, {found.high:.4g}], n = {found.n}"


def payload(rule: Rule, state: State, found: Estimate, now: float) -> dict[str, Any]:
    return {
        "alarm": rule.name,
        "state": state,
        "metric": rule.metric,
        "op": rule.op,
        "threshold": rule.value,
        "window_s": rule.window,
        **found.as_dict(),
        "time": now,
    }


def post(url: str, content: Mapping[str, Any]) -> bool:
    """False after three tries, which is logged."""
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    for number in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S):
                return True
        except Exception as error:  # noqa: BLE001  whatever a server of others does, the watch goes on
            reason = getattr(error, "code", None) or type(getattr(error, "reason", error)).__name__
            if number < TRIES:
                time.sleep(PAUSE_S)
    log.error("the webhook %s did not take the alarm (%s)", without_secrets(url).partition("?")[0], reason)
    return False


def track(
    tracker: Tracker,
    rules: Sequence[Rule],
    found: Mapping[str, Estimate],
    events: Sequence[tuple[Rule, State]],
    now: float,
) -> None:
    """Metrics of the rules at this second, and the state of each alarm as a tag."""
    metrics = {}
    for rule in rules:
        if (one := found.get(rule.name)) is None:
            continue
        name = f"watch/{rule.metric}/{shown(rule.window)}"
        metrics |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    if metrics:
        tracker.metrics(metrics, int(now))
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    tags = {tag(rule): f"{state} {when}: {found[rule.name].value:.4g}" for rule, state in events}
    if tags:
        tracker.tags(tags)


def tag(rule: Rule) -> str:
    """Without the signs that MLflow forbids."""
    return f"alarm.{rule.name.replace('>', 'above').replace('<', 'below')}"
