"""Metrics of what a served model said, with 95 % intervals, over time. docs/metrics.md defines them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.evaluation.statistics import Estimate, bootstrap, bootstrap_mean, proportion
from rlhf.serving.watch.records import Observed

REWARD = "reward."
RESPONSES, VOTES, UNSAFE, REFUSALS, LENGTH = "responses", "votes", "unsafe", "refusals", "length"
FIRST_TOKEN, SPEED, THUMBS_UP = "first_token_s", "tokens_per_s", "thumbs_up"
NAMES = (RESPONSES, UNSAFE, REFUSALS, LENGTH, FIRST_TOKEN, SPEED, THUMBS_UP, VOTES)


@dataclass(frozen=True)
class Bucket:
    start: float
    end: float
    metrics: dict[str, Estimate]
    """Without those of which nothing is known."""


def series(rows: Sequence[Observed], since: float, until: float, count: int) -> list[Bucket]:
    """`count` equal parts of the time from `since` to `until`."""
    edges = np.linspace(since, until, count + 1)
    place = np.searchsorted(edges, [row.created for row in rows], side="right") - 1
    parts: list[list[Observed]] = [[] for _ in range(count)]
    for row, where in zip(rows, place, strict=True):
        if 0 <= where < count:
            parts[where].append(row)
    return [Bucket(float(edges[n]), float(edges[n + 1]), metrics_of(part)) for n, part in enumerate(parts)]


def metrics_of(rows: Sequence[Observed], fewest: int = 1) -> dict[str, Estimate]:
    """Clustered by person, or by conversation where there is no name. `fewest`: the clusters that a mean needs; one has
    no spread, and so an empty interval."""
    rewards = sorted({name for row in rows for name in row.scores})
    votes = sum(row.compared + len(row.thumbs) for row in rows)
    thumbs = [(row.cluster, up) for row in rows for up in row.thumbs]
    found = {
        RESPONSES: _count(len(rows)),
        **{REWARD + name: _mean(rows, lambda row, name=name: row.scores.get(name), fewest) for name in rewards},
        UNSAFE: _proportion([(row.cluster, row.unsafe) for row in rows if row.unsafe is not None]),
        REFUSALS: _proportion([(row.cluster, row.refused) for row in rows]),
        LENGTH: _mean(rows, lambda row: row.length, fewest),
        FIRST_TOKEN: _mean(rows, lambda row: row.first_token_s, fewest),
        SPEED: _speed(rows, fewest),
        THUMBS_UP: _proportion(thumbs),
        VOTES: _count(votes),
    }
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def values_of(rows: Sequence[Observed], name: str) -> list[tuple[str, float]]:
    """(cluster, value) of the responses that have this value: a reward, or the length."""
    if name == LENGTH:
        return [(row.cluster, float(row.length)) for row in rows]
    reward = name.removeprefix(REWARD)
    return [(row.cluster, row.scores[reward]) for row in rows if reward in row.scores]


def _count(count: int) -> Estimate:
    return Estimate(float(count), float(count), float(count), count)


def _mean(rows: Sequence[Observed], value: Callable[[Observed], float | None], fewest: int) -> Estimate | None:
    known = [(row.cluster, one) for row in rows if (one := value(row)) is not None]
    clusters = [cluster for cluster, _ in known]
    return bootstrap_mean([one for _, one in known], clusters) if len(set(clusters)) >= fewest else None


def _proportion(outcomes: Sequence[tuple[str, bool]]) -> Estimate | None:
    if not outcomes:
        return None
    return proportion([float(one) for _, one in outcomes], [cluster for cluster, _ in outcomes])


def _speed(rows: Sequence[Observed], fewest: int) -> Estimate | None:
    """All tokens over all seconds: a long response counts more than a short one."""
    timed = [row for row in rows if row.seconds > 0]
    clusters = [row.cluster for row in timed]
    if len(set(clusters)) < fewest:
        return None
    columns = np.array([[row.length, row.seconds] for row in timed], dtype=np.float64)
    return bootstrap(columns, clusters, lambda sums: sums[..., 0] / sums[..., 1])
