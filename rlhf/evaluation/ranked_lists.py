"""Whether a reward model ranks the responses to a prompt as another judge does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from rlhf.evaluation.statistics import Estimate, bootstrap_mean, proportion


def ranked_lists(lines: Iterable[Mapping[str, Any]]) -> dict[str, Estimate | int]:
    """Of scored lists, means over them, clustered by prompt; {} without a list:

    spearman     rank correlation of the model's scores and the judge's within the list
    kendall      Kendall's tau-b of the same
    best_is_best proportion in which the response that the model likes best has the judge's highest score

    A list on which either gives all responses one score has no order, and is `left_out`.
    """
    found: dict[str, list[float]] = {"spearman": [], "kendall": [], "best_is_best": []}
    prompts, left_out = [], 0
    for line in lines:
        if line["form"] != "list":
            continue
        ours, theirs = np.array(line["scores"]), np.array(line["judged"])
        if not np.ptp(ours) or not np.ptp(theirs):
            left_out += 1
            continue
        prompts.append(line["prompt"])
        found["spearman"].append(float(np.corrcoef(stats.rankdata(ours), stats.rankdata(theirs))[0, 1]))
        found["kendall"].append(_kendall(ours, theirs))
        best_N = ours == ours.max()
        found["best_is_best"].append(float((theirs[best_N] == theirs.max()).mean()))
    if not prompts:
        return {"left_out": left_out} if left_out else {}
    correlations = {name: bootstrap_mean(found[name], prompts) for name in ("spearman", "kendall")}
    return {**correlations, "best_is_best": proportion(found["best_is_best"], prompts), "left_out": left_out}


def _kendall(ours: np.ndarray, theirs: np.ndarray) -> float:
    found: Any = stats.kendalltau(ours, theirs)
    return float(found.statistic)
