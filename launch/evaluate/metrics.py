"""report.json of `rlhf evaluate reward`, from the scores. docs/metrics.md defines every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from launch.evaluate.scores import ScoreFile
from rlhf.evaluation.agreement import agreement
from rlhf.evaluation.calibration import calibration
from rlhf.evaluation.length_bias import length_bias
from rlhf.evaluation.pairs import Pairs, pairs_of
from rlhf.evaluation.ranked_lists import ranked_lists
from rlhf.evaluation.reward_accuracy import accuracy, floors
from rlhf.evaluation.reward_bench import reward_bench, reward_bench_2
from rlhf.evaluation.score_distribution import score_distribution
from rlhf.evaluation.statistics import Estimate

BAG_OF_WORDS = "bag_of_words"
WORST = 20  # mistakes that the report shows


@dataclass(frozen=True)
class Margins:
    """Of another scorer, for the pairs that it could read."""

    rows_N: np.ndarray
    margin_N: np.ndarray

    @classmethod
    def of(cls, pairs: Pairs) -> Margins:
        return cls(pairs.rows_N, pairs.margin_N)


def model_metrics(scores: ScoreFile, model: str, words: Margins | None) -> tuple[dict[str, Any], Margins | None]:
    """The metrics of one model, and its margins, for comparison with others; None where the data has no pairs."""
    pairs = pairs_of(scores.lines(model))
    count, reasons = scores.left_out(model)
    found: dict[str, Any] = {"pairs": len(pairs), "left_out": {"rows": count, "reasons": reasons}}
    if len(pairs):
        found |= accuracy(pairs)
        found |= floors(pairs, {BAG_OF_WORDS: _at(words, pairs.rows_N)} if words else {})
        found["calibration"] = calibration(pairs.margin_N, pairs.prompts_N)
        found["length"] = length_bias(pairs)
        found["scores"] = score_distribution(pairs)
    benchmarks = {
        "reward_bench": reward_bench(pairs) if len(pairs) else {},
        "reward_bench_2": reward_bench_2(scores.lines(model)),
        "lists": ranked_lists(scores.lines(model)),
    }
    found |= {name: result for name, result in benchmarks.items() if result}
    return found, Margins.of(pairs) if len(pairs) else None


def agreements(margins: Mapping[str, Margins], scores: ScoreFile) -> list[dict[str, Any]]:
    """Of every two models, on the pairs that both could read."""
    if len(margins) < 2:
        return []
    pairs = pairs_of(scores.lines(next(iter(margins))))
    prompt_of = dict(zip(pairs.rows_N.tolist(), pairs.prompts_N.tolist(), strict=True))
    found = []
    for a, b in combinations(margins, 2):
        rows_N = np.intersect1d(np.intersect1d(margins[a].rows_N, margins[b].rows_N), pairs.rows_N)
        if len(rows_N):
            prompts_N = np.array([prompt_of[row] for row in rows_N.tolist()])
            of_a_N, of_b_N = _at(margins[a], rows_N), _at(margins[b], rows_N)
            found.append({"a": a, "b": b, **agreement(of_a_N, of_b_N, prompts_N)})
    return found


def worst_rows(margins: Margins) -> dict[int, float]:
    """Rows of the pairs that are most wrong, and their margins, the worst first."""
    order = np.argsort(margins.margin_N, kind="stable")[:WORST]
    return {int(margins.rows_N[n]): float(margins.margin_N[n]) for n in order if margins.margin_N[n] < 0}


def as_json(value: Any) -> Any:
    """Estimates as dicts, and what holds them."""
    if isinstance(value, Estimate):
        return value.as_dict()
    if isinstance(value, Mapping):
        return {key: as_json(entry) for key, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, list) else value


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The value of every estimate and every number by its dotted name, for MLflow."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping) and "value" in value:
            found[f"{prefix}{name}"] = value["value"]
        elif isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif type(value) in (int, float):
            found[f"{prefix}{name}"] = value
    return found


def _at(margins: Margins, rows_N: np.ndarray) -> np.ndarray:
    """The margins of `rows_N`, which are all there. Rows of one item's several pairs keep their order."""
    return margins.margin_N[np.searchsorted(margins.rows_N, rows_N)]
