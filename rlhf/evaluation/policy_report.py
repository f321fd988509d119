"""What a policy's answers look like: reward alone hides collapse, so length, endings and variety stand beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from rlhf.evaluation.intervals import Estimate, bootstrap_mean, wilson


def policy_report(
    answers: Sequence[str],
    scores: Mapping[str, Sequence[float]],
    finished: Sequence[bool],
    lengths: Sequence[int],
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimates over n ≥ 1 answers to different prompts:

    each name in `scores`   mean score
    length                  mean number of tokens
    eos_share               share of answers that ended themselves (Wilson's interval)
    distinct_2              mean over answers of distinct bigrams / all bigrams of words: low where answers repeat
                            themselves. Answers of fewer than two words are left out; without others, so is the figure
    """
    report = {name: bootstrap_mean(values, seed=seed) for name, values in scores.items()}
    report["length"] = bootstrap_mean(lengths, seed=seed)
    report["eos_share"] = wilson(sum(map(bool, finished)), len(finished))
    variety = [share for share in map(distinct_bigrams, answers) if share is not None]
    if variety:
        report["distinct_2"] = bootstrap_mean(variety, seed=seed)
    return report


def distinct_bigrams(answer: str) -> float | None:
    """Distinct bigrams / all bigrams of the answer's words (Li et al. 2016, arXiv 1510.03055); None without bigrams."""
    words = answer.split()
    bigrams = list(pairwise(words))
    return len(set(bigrams)) / len(bigrams) if bigrams else None
