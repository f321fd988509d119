"""How well a reward model ranks held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from reward_data import Preference, normalised_prompt
from rlhf.evaluation.held_out import rows_of
from rlhf.evaluation.statistics import proportion

RATINGS = ("significantly", "better", "slightly", "negligibly", "unrated")
CALIBRATION_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def reward_report(
    chosen_scores: Sequence[float],
    rejected_scores: Sequence[float],
    ratings: Sequence[str],
    tags: Sequence[str],
    prompts: Sequence[str],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
) -> dict:
    """Metrics of one reward model on n ≥ 1 pairs; every argument has one entry per pair.

    accuracy       proportion of pairs whose chosen response scores higher (ties count half)
    ties           proportion of pairs with equal scores
    by_rating      accuracy for each rating of `RATINGS` that occurs, as in table 8 of Llama 2 (arXiv 2307.09288)
    by_tag         accuracy for each tag that occurs
    length         `chosen_is_longer`: accuracy of always preferring the longer response, which a model must beat;
                   `model_prefers_longer`: how often the model does so, among pairs of unequal length
    calibration    see `calibration`

    Proportions are `Estimate` dicts, clustered by prompt: {"value", "low", "high", "n"}. Lengths may be in any one unit.
    """
    won = wins(chosen_scores, rejected_scores)
    longer = wins(chosen_lengths, rejected_lengths)
    unequal = [i for i, chosen_is_longer in enumerate(longer) if chosen_is_longer != 0.5]

    def estimate(outcomes: Sequence[float], rows: Sequence[int]) -> dict:
        return _proportion(outcomes, prompts, rows)

    def by(labels: Sequence[str], order: Sequence[str]) -> dict:
        rows_of = {label: [i for i, own in enumerate(labels) if own == label] for label in order}
        return {label: estimate(won, rows) for label, rows in rows_of.items() if rows}

    everything = range(len(won))
    length = {"chosen_is_longer": estimate(longer, everything)}
    if unequal:
        agrees = [win if chosen_is_longer else 1 - win for win, chosen_is_longer in zip(won, longer, strict=True)]
        length["model_prefers_longer"] = estimate(agrees, unequal)
    return {
        "accuracy": estimate(won, everything),
        "ties": estimate([float(win == 0.5) for win in won], everything),
        "by_rating": by(ratings, RATINGS),
        "by_tag": by(tags, sorted(set(tags))),
        "length": length,
        "calibration": calibration(chosen_scores, rejected_scores, prompts),
    }


def calibration(chosen_scores: Sequence[float], rejected_scores: Sequence[float], prompts: Sequence[str]) -> list[dict]:
    """Whether σ(score gap) is the probability that the response with the higher score was chosen.

    Pairs are binned by σ(|gap|) ≥ ½. Each bin with pairs has its edges, the mean predicted probability, and the observed
    proportion as an `Estimate` dict. The two are equal for a calibrated model; predicted is larger for an overconfident
    one.
    """
    won = wins(chosen_scores, rejected_scores)
    predicted = [1 / (1 + math.exp(-abs(c - r))) for c, r in zip(chosen_scores, rejected_scores, strict=True)]
    bins = []
    for low, high in pairwise(CALIBRATION_EDGES):
        rows = [i for i, p in enumerate(predicted) if low <= p < high or p == high == 1.0]
        if rows:
            mean = sum(predicted[i] for i in rows) / len(rows)
            observed = _proportion(won, prompts, rows)
            bins.append({"low": low, "high": high, "predicted": mean, "observed": observed})
    return bins


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where ours is larger, 0 where theirs is, ½ where they are equal."""
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def pair_rows(pairs: Sequence[Preference], values: Mapping[str, Sequence[float]]) -> list[dict]:
    """A row of `held_out.jsonl` for each pair."""
    prompts = [normalised_prompt(pair.prompt) for pair in pairs]
    texts = [f"{prompt}\n{pair.chosen}\n{pair.rejected}" for prompt, pair in zip(prompts, pairs, strict=True)]
    return rows_of(texts, prompts, values)


def _proportion(outcomes: Sequence[float], prompts: Sequence[str], rows: Sequence[int]) -> dict:
    return proportion([outcomes[i] for i in rows], [prompts[i] for i in rows]).as_dict()
