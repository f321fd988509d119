"""report.json of `rlhf evaluate policy`, from responses and scores. docs/metrics.md defines every key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from launch.evaluate.policy.policies import Response
from launch.report.section import nested
from reward_data import Prompt, normalised_prompt
from rlhf.evaluation.best_of_n import best_of_n
from rlhf.evaluation.diversity import diversity
from rlhf.evaluation.policy_report import HeldOutResponses, policy_report
from rlhf.evaluation.preference import preference
from rlhf.evaluation.refusals import refusal_rates


@dataclass
class Sampled:
    """What one policy says. A row is a prompt and the number of a sample; all policies have the same rows."""

    model: str  # where it is
    samples: int  # rows of a prompt, which are neighbours
    responses: list[Response | None]  # None: there is none
    reasons: list[str]  # why some are None
    scores: dict[str, list[float | None]] = field(default_factory=dict)  # by reward; None: no response, or it failed
    kl: list[float | None] | None = None  # nats of each response against the reference
    refused: list[float | None] | None = None  # 1 for a refusal


def model_metrics(sampled: Sampled, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The metrics of one policy at one temperature; `prompts` has the prompt of each row."""
    there = [row for row, response in enumerate(sampled.responses) if response is not None]
    found: dict[str, Any] = {
        "model": sampled.model,
        "responses": len(there),
        "left_out": {"responses": len(sampled.responses) - len(there), "reasons": sampled.reasons[:10]},
        "failed": {name: sum(scores[row] is None for row in there) for name, scores in sampled.scores.items()},
    }
    if there:
        found |= _estimates(sampled, prompts, there)
        found |= _of_groups(sampled, prompts)
    tags = sorted({prompts[row].tag for row in there})
    if len(tags) > 1:
        rows_of = {tag: [row for row in there if prompts[row].tag == tag] for tag in tags}
        found["by_tag"] = {tag: _estimates(sampled, prompts, rows) for tag, rows in rows_of.items()}
    return found


def _estimates(sampled: Sampled, prompts: Sequence[Prompt], rows: Sequence[int]) -> dict[str, Any]:
    responses = [response for row in rows if (response := sampled.responses[row]) is not None]
    held_out = HeldOutResponses(
        texts=[response.text for response in responses],
        lengths=[response.length for response in responses],
        finished=[response.finished for response in responses],
        scores={f"rewards.{name}": [scores[row] for row in rows] for name, scores in sampled.scores.items()},
        kl=_known(sampled.kl, rows),
        flagged=None,
    )
    found = nested(policy_report(held_out, [prompts[row] for row in rows]))
    if sampled.refused is not None:
        known = [row for row in rows if sampled.refused[row] is not None]
        refused = [bool(sampled.refused[row]) for row in known]
        found["refusals"] = refusal_rates(refused, [prompts[row] for row in known])
    return found


def _known(values: Sequence[float | None] | None, rows: Sequence[int]) -> list[float] | None:
    """The values of the rows if all are known."""
    found = [value for row in rows if values is not None and (value := values[row]) is not None]
    return found if len(found) == len(rows) else None


def _of_groups(sampled: Sampled, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What needs the responses to a prompt together."""
    starts = range(0, len(prompts), sampled.samples)
    clusters = [normalised_prompt(prompts[start].messages) for start in starts]
    groups = [[one.text for one in sampled.responses[s : s + sampled.samples] if one is not None] for s in starts]
    there = [number for number, texts in enumerate(groups) if texts]
    found: dict[str, Any] = {"diversity": diversity([groups[n] for n in there], [clusters[n] for n in there])}
    if sampled.samples > 1 and sampled.scores:
        found["best_of_n"] = _best_of_n(sampled, clusters)
    return found


def _best_of_n(sampled: Sampled, clusters: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{the reward that selects: {the reward that values: curve}}, on prompts whose samples all have all scores."""
    names = list(sampled.scores)
    columns = [[np.nan if value is None else value for value in sampled.scores[name]] for name in names]
    scores_KPS = np.array(columns, dtype=np.float64).reshape(len(names), -1, sampled.samples)
    whole_P = np.array([np.isfinite(of_prompt_KS).all() for of_prompt_KS in scores_KPS.swapaxes(0, 1)])
    if not whole_P.any():
        return {}
    own = [cluster for cluster, whole in zip(clusters, whole_P.tolist(), strict=True) if whole]
    scores = dict(zip(names, scores_KPS[:, whole_P], strict=True))
    return {a: {b: best_of_n(scores[a], scores[b], own) for b in names} for a in names}


def pair_metrics(policies: Mapping[str, Sampled], prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """Every two policies by every reward, on the rows where both have a score: {"a vs b": {reward: …}}."""
    clusters = clusters_of(prompts)
    found = {}
    for a, b in combinations(policies, 2):
        of_rewards = {}
        for name in policies[a].scores:
            rows = list(_common_rows(policies[a].scores[name], policies[b].scores[name]))
            if rows:
                scores_N, lengths_N = (
                    (column(policies[a], name, rows, of), column(policies[b], name, rows, of))
                    for of in ("score", "length")
                )
                of_rewards[name] = preference(scores_N, lengths_N, clusters[rows])
        found[pair_name(a, b)] = of_rewards
    return found


def pair_name(a: str, b: str) -> str:
    return f"{a} vs {b}"


def clusters_of(prompts: Sequence[Prompt]) -> np.ndarray:
    """A number for each prompt, the same for equal prompts."""
    return np.unique([normalised_prompt(prompt.messages) for prompt in prompts], return_inverse=True)[1]


def _common_rows(a: Sequence[float | None], b: Sequence[float | None]) -> Iterator[int]:
    return (row for row, pair in enumerate(zip(a, b, strict=True)) if None not in pair)


def column(sampled: Sampled, reward: str, rows: Sequence[int], of: str) -> np.ndarray:
    """Scores, or lengths in characters: tokens of two tokenizers cannot be compared."""
    if of == "score":
        return np.array([sampled.scores[reward][row] for row in rows], dtype=np.float64)
    texts = (response.text if (response := sampled.responses[row]) else "" for row in rows)
    return np.array([len(text) for text in texts], dtype=np.float64)
