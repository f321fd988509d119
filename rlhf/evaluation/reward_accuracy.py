"""How often the chosen response has the higher score, over all pairs and by what they are, and what that adds to floors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rlhf.evaluation.pairs import Pairs
from rlhf.evaluation.reward_report import RATINGS
from rlhf.evaluation.statistics import Estimate, paired_difference, proportion

LENGTH_RATIOS = {  # chosen length / rejected length, lower edge inside
    "under_0.5": (0.0, 0.5),
    "0.5_to_0.8": (0.5, 0.8),
    "0.8_to_1.25": (0.8, 1.25),
    "1.25_to_2": (1.25, 2.0),
    "2_and_more": (2.0, np.inf),
}
MOST_TURNS = 5  # and more are one group


def wins(ours_N: np.ndarray, theirs_N: np.ndarray) -> np.ndarray:
    """1 where ours is larger, 0 where theirs is, ½ where they are equal."""
    return np.where(ours_N == theirs_N, 0.5, ours_N > theirs_N)


def accuracy(pairs: Pairs) -> dict[str, Estimate | dict[str, Estimate]]:
    """`accuracy` (a tie counts half), the proportion of `ties`, and accuracy by rating, file, tag, length and turns."""
    wins_N = wins(pairs.chosen_N, pairs.rejected_N)
    ratio_N = pairs.chosen_length_N / pairs.rejected_length_N
    gaps = {name: (ratio_N >= low) & (ratio_N < high) for name, (low, high) in LENGTH_RATIOS.items()}
    turns_N = np.minimum(pairs.turns_N, MOST_TURNS)
    turns = {f"{n:.0f}" if n < MOST_TURNS else f"{n:.0f}_and_more": turns_N == n for n in np.unique(turns_N)}
    found: dict[str, Estimate | dict[str, Estimate]] = {
        "accuracy": proportion(wins_N, pairs.prompts_N),
        "ties": proportion((wins_N == 0.5).astype(float), pairs.prompts_N),
    }
    for name, groups in {
        "by_rating": pairs.ratings.groups(RATINGS),
        "by_source": pairs.files.groups(),
        "by_tag": pairs.tags.groups(),
        "by_length_gap": gaps,
        "by_turns": turns,
    }.items():
        found[name] = {
            group: proportion(wins_N[mask_N], pairs.prompts_N[mask_N])
            for group, mask_N in groups.items()
            if mask_N.any()
        }
    return found


def floors(pairs: Pairs, floor_margins: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    """`floors`: accuracy of what reads no meaning; `above_floors`: accuracy of the model less that, pair by pair.

    `longer` always prefers the longer response and `shorter` the shorter one; `floor_margins` has further ones, each as
    its score of the chosen response less that of the rejected one.
    """
    longer_N = wins(pairs.chosen_length_N, pairs.rejected_length_N)
    outcomes = {"longer": longer_N, "shorter": 1 - longer_N}
    outcomes |= {name: wins(margin_N, np.zeros(len(pairs))) for name, margin_N in floor_margins.items()}
    ours_N = wins(pairs.chosen_N, pairs.rejected_N)
    return {
        "floors": {name: proportion(theirs_N, pairs.prompts_N) for name, theirs_N in outcomes.items()},
        "above_floors": {
            name: paired_difference(ours_N, theirs_N, pairs.prompts_N) for name, theirs_N in outcomes.items()
        },
    }
