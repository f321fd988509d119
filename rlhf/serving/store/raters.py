"""How far votes can be trusted: do people agree, do they prefer a place, and do reward models agree with them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.evaluation.statistics import Estimate, bootstrap, proportion

GRADES = {"negligibly": 1, "slightly": 2, "better": 3, "significantly": 4}


class Raters(NamedTuple):
    votes: int
    raters: int
    """With a name."""
    alpha: Estimate | None
    """Krippendorff's, of the grades; None where no pair has votes of two people, or all grades are equal."""
    first_chosen: Estimate | None
    """Position bias: how often what was shown first is chosen. ½: none."""
    reward_agrees: dict[str, Estimate]
    """How often a reward model's score is higher for the chosen response; equal scores count half."""


def raters(votes: Iterable[Any], exchanges: Mapping[str, Any], scores: Iterable[Any]) -> Raters:
    """Of the votes on pairs; the last one of a person on a pair counts."""
    last = {(_person(vote), *sorted((vote.first, vote.second))): vote for vote in votes if vote.second is not None}
    units: dict[Any, list[float]] = defaultdict(list)
    for (_, *pair), vote in last.items():
        units[tuple(pair)].append(grade(vote))
    prompts = [str(exchanges[vote.first].messages) for vote in last.values()]
    first = [float(vote.chosen == "first") for vote in last.values()]
    return Raters(
        votes=len(last),
        raters=len({vote.user for vote in last.values()} - {None}),
        alpha=krippendorff_alpha(list(units.values())),
        first_chosen=proportion(first, prompts) if last else None,
        reward_agrees=_reward_agrees(last.values(), exchanges, scores),
    )


def grade(vote: Any) -> int:
    """From -4 to 4, above 0 where the response is better whose id comes first in the alphabet."""
    chosen, other = (vote.first, vote.second) if vote.chosen == "first" else (vote.second, vote.first)
    return GRADES[vote.rating] if chosen < other else -GRADES[vote.rating]


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> Estimate | None:
    """Agreement on an ordinal scale (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"): 1 where all agree,
    0 where they agree as often as by chance. `units`: the values that each unit got; units with one value say nothing.
    The interval is that of a bootstrap over units.

    U units; c, k values; coincidences_UCC counts pairs of values within a unit, weighted by 1 / (its values - 1).
    """
    paired = [unit for unit in units if len(unit) > 1]
    scale = sorted({value for unit in paired for value in unit})
    if len(scale) < 2:
        return None
    place = {value: index for index, value in enumerate(scale)}
    coincidences_UCC = np.zeros((len(paired), len(scale), len(scale)))
    for number, unit in enumerate(paired):
        counts_C = np.bincount([place[value] for value in unit], minlength=len(scale))
        coincidences_UCC[number] = (np.outer(counts_C, counts_C) - np.diag(counts_C)) / (len(unit) - 1)
    return bootstrap(coincidences_UCC.reshape(len(paired), -1), None, _alpha)


def _alpha(sums_K: np.ndarray) -> np.ndarray:
    """Of sums of coincidences, (…, C · C) → (…); NaN where all values are equal."""
    C = math.isqrt(sums_K.shape[-1])
    coincidences_CC = sums_K.reshape(*sums_K.shape[:-1], C, C)
    n_C = coincidences_CC.sum(-1)
    # The distance of two ranks: values from one to the other, each end counted half.
    middle_C = n_C.cumsum(-1) - n_C / 2
    distance_CC = (middle_C[..., :, None] - middle_C[..., None, :]) ** 2
    expected = (n_C[..., :, None] * n_C[..., None, :] * distance_CC).sum((-2, -1)) / (n_C.sum(-1) - 1)
    with np.errstate(invalid="ignore"):
        return 1 - (coincidences_CC * distance_CC).sum((-2, -1)) / expected


def _reward_agrees(votes: Iterable[Any], exchanges: Mapping[str, Any], scores: Iterable[Any]) -> dict[str, Estimate]:
    by_name: dict[str, dict[str, float]] = defaultdict(dict)
    for score in scores:
        by_name[score.name][score.exchange_id] = score.value
    votes, found = list(votes), {}
    for name, values in sorted(by_name.items()):
        scored = [vote for vote in votes if vote.first in values and vote.second in values]
        if scored:
            prompts = [str(exchanges[vote.first].messages) for vote in scored]
            found[name] = proportion([_agrees(vote, values) for vote in scored], prompts)
    return found


def _agrees(vote: Any, values: Mapping[str, float]) -> float:
    margin = values[vote.first] - values[vote.second]
    return 0.5 if margin == 0 else float((margin > 0) == (vote.chosen == "first"))


def _person(vote: Any) -> Any:
    return ("person", vote.user) if vote.user is not None else ("vote", vote.id)
