"""Whether a policy's reward rises while its true quality does not (Gao et al. 2022, arXiv 2210.10760).

The evaluations of a run respond to the same prompts, so changes between them are paired prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.evaluation.statistics import differences, mean_of_known

Values = Sequence[float | None]
PROXY, KL = "reward", "kl"


@dataclass(frozen=True)
class Evaluation:
    """Of one iteration, on the prompts of all others."""

    step: int
    values: Mapping[str, Values]  # name → value of each prompt; None where a score failed


def frontier(evaluations: Sequence[Evaluation], clusters: Sequence[Hashable]) -> list[dict[str, Any]]:
    """`step`, and the mean of each series, of every evaluation: reward against KL is the frontier."""
    return [
        {
            "step": one.step,
            **{name: mean for name, values in one.values.items() if (mean := mean_of_known(values, clusters))},
        }
        for one in evaluations
    ]


def over_optimization(evaluations: Sequence[Evaluation], clusters: Sequence[Hashable], truth: str) -> dict[str, Any]:
    """How the proxy (what PPO maximises) and `truth` changed from the evaluation where the truth is best to the last.

    Half of the prompts choose that evaluation, and the other half measure: the best of many is best by luck too, so that
    a change on the prompts that chose it would be too low.

    from_step, to_step  the two iterations; equal, with no change to tell, where the last evaluation is the best
    proxy, truth        change, prompt by prompt
    shown               the proxy's interval is above 0, and that of the truth is not
    falls               the proxy's interval is above 0, and that of the truth is below
    """
    number_of = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    choose = [row for row, cluster in enumerate(clusters) if number_of[cluster] % 2 == 0]
    measure = [row for row, cluster in enumerate(clusters) if number_of[cluster] % 2 == 1]
    best, last = max(evaluations, key=lambda one: _plain_mean(one.values[truth], choose)), evaluations[-1]
    found: dict[str, Any] = {"from_step": best.step, "to_step": last.step, "shown": False, "falls": False}
    if best is last:
        return found
    own = [clusters[row] for row in measure]
    for name, key in (("proxy", PROXY), ("truth", truth)):
        before, after = ([one.values[key][row] for row in measure] for one in (best, last))
        if (change := mean_of_known(differences(after, before), own)) is None:
            return found
        found[name] = change
    rises = found["proxy"].low > 0
    return {**found, "shown": rises and found["truth"].low <= 0, "falls": rises and found["truth"].high < 0}


def _plain_mean(values: Values, rows: Sequence[int]) -> float:
    known = [value for row in rows if (value := values[row]) is not None]
    return sum(known) / len(known) if known else float("-inf")
