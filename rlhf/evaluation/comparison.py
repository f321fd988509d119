"""Two runs on the same held-out items, and the same two settings over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.evaluation.held_out import ITEM, PROMPT, Row
from rlhf.evaluation.statistics import Estimate, mean_of_few, paired_difference


def not_paired(a: Sequence[Row], b: Sequence[Row]) -> str | None:
    """Why the values of two runs cannot be compared item by item; None where they can."""
    items_a, items_b = ({row[ITEM] for row in rows} for rows in (a, b))
    if items_a != items_b:
        return f"other held-out items: {len(items_a & items_b)} in common of {len(items_a)} and {len(items_b)}"
    return None


def difference_by_item(a: Sequence[Row], b: Sequence[Row], metric: str) -> Estimate | None:
    """Mean of a − b over the items that have this metric in both, clustered by prompt; None where there are none."""
    of_b = {row[ITEM]: row[metric] for row in b if metric in row}
    both = [(row[metric], of_b[row[ITEM]], row[PROMPT]) for row in a if metric in row and row[ITEM] in of_b]
    if not both:
        return None
    values_a, values_b, prompts = zip(*both, strict=True)
    return paired_difference(values_a, values_b, prompts)


def over_seeds(value_of: Mapping[int, float]) -> Estimate | None:
    """Mean over the seeds; None for a single one, whose spread is not known."""
    return mean_of_few([*value_of.values()]) if len(value_of) > 1 else None


def difference_by_seed(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate | None:
    """Mean of a − b over the seeds that both have: what runs of one seed have in common cancels."""
    return over_seeds({seed: a[seed] - b[seed] for seed in a if seed in b})
