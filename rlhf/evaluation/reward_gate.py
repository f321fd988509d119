"""Whether a reward model may take the place of another: more often right, and worse on no guard, beyond the intervals.

The limits of the guards stand here; docs/how-to/promote-a-model.md explains them.
"""

from __future__ import annotations

import numpy as np

from rlhf.evaluation.calibration import BINS, confidence_gaps, error_of
from rlhf.evaluation.gate import Check
from rlhf.evaluation.pairs import Pairs
from rlhf.evaluation.reward_accuracy import wins
from rlhf.evaluation.statistics import Estimate, bootstrap, paired_difference

ECE_MAY_GROW = 0.02  # of the expected calibration error
ACCURACY_MAY_FALL = 0.0  # where the chosen response is shorter, and of other tags


def decide(candidate: Pairs, champion: Pairs, own_tag: str) -> list[Check]:
    """The candidate takes the champion's place if it passes all. Both have the same pairs in the same order; intervals are
    paired and clustered by prompt. The models are compared on pairs of `own_tag`, or on all where none has it.
    """
    tags = candidate.tags.groups()
    own_N = tags.get(own_tag, np.ones(len(candidate), dtype=bool))
    checks = [_more_accurate(candidate, champion, own_N), _as_calibrated(candidate, champion, own_N)]
    shorter_N = own_N & (candidate.chosen_length_N < candidate.rejected_length_N)
    if shorter_N.any():
        checks.append(_as_accurate(candidate, champion, shorter_N, "shorter", "where the chosen response is shorter"))
    for tag, mask_N in tags.items():
        if (mask_N != own_N).any():
            checks.append(_as_accurate(candidate, champion, mask_N, f"tag {tag}", f"on pairs tagged {tag}"))
    return checks


def _more_accurate(candidate: Pairs, champion: Pairs, own_N: np.ndarray) -> Check:
    value = _difference(candidate, champion, own_N)
    return Check("accuracy", value, 0.0, value.low > 0, "the interval must lie above 0")


def _as_accurate(candidate: Pairs, champion: Pairs, mask_N: np.ndarray, name: str, where: str) -> Check:
    value, limit = _difference(candidate, champion, mask_N), 0.0 - ACCURACY_MAY_FALL
    what = f"accuracy {where}; the interval may not lie below {limit:g}"
    return Check(f"guard {name}", value, limit, value.high >= limit, what)


def _as_calibrated(candidate: Pairs, champion: Pairs, own_N: np.ndarray) -> Check:
    """Both errors of a resample have the same pairs."""
    both = [confidence_gaps(pairs.margin_N[own_N]) for pairs in (candidate, champion)]
    value = bootstrap(
        np.concatenate(both, axis=1),
        candidate.prompts_N[own_N],
        lambda sums: error_of(sums[..., : BINS + 1]) - error_of(sums[..., BINS + 1 :]),
    )
    what = f"expected calibration error; the interval may not lie above {ECE_MAY_GROW:g}"
    return Check("guard calibration", value, ECE_MAY_GROW, value.low <= ECE_MAY_GROW, what)


def _difference(candidate: Pairs, champion: Pairs, mask_N: np.ndarray) -> Estimate:
    own_N, other_N = (wins(pairs.chosen_N, pairs.rejected_N)[mask_N] for pairs in (candidate, champion))
    return paired_difference(own_N, other_N, candidate.prompts_N[mask_N])
