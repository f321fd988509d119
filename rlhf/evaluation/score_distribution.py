"""How the scores of chosen and rejected responses and their margins are spread."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.evaluation.pairs import Pairs
from rlhf.evaluation.statistics import bootstrap_mean

PERCENTILES = (5, 25, 50, 75, 95)
BINS = 40


def score_distribution(pairs: Pairs) -> dict[str, Any]:
    """`chosen`, `rejected` and `margin`: `mean` (estimate), `std`, `percentiles`; and `histogram`, counts in equal bins, of
    the scores together from their lowest to their highest, and of the margins.
    """
    series = {"chosen": pairs.chosen_N, "rejected": pairs.rejected_N, "margin": pairs.margin_N}
    found: dict[str, Any] = {
        name: {
            "mean": bootstrap_mean(values_N, pairs.prompts_N),
            "std": float(values_N.std(ddof=1)) if len(values_N) > 1 else 0.0,
            "percentiles": dict(zip(map(str, PERCENTILES), np.percentile(values_N, PERCENTILES).tolist(), strict=True)),
        }
        for name, values_N in series.items()
    }
    edges = np.histogram_bin_edges(np.concatenate([pairs.chosen_N, pairs.rejected_N]), BINS)
    margin_counts, margin_edges = np.histogram(pairs.margin_N, BINS)
    found["histogram"] = {
        "edges": edges.tolist(),
        "chosen": np.histogram(pairs.chosen_N, edges)[0].tolist(),
        "rejected": np.histogram(pairs.rejected_N, edges)[0].tolist(),
        "margin_edges": margin_edges.tolist(),
        "margin": margin_counts.tolist(),
    }
    return found
