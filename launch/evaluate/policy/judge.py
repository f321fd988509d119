"""--judge: a language model behind an endpoint compares the policies, two at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from rich.progress import Progress

from launch.evaluate.policy.endpoint import KEY, Completion, Endpoint, Failure
from launch.evaluate.policy.metrics import Sampled, column, pair_name
from launch.evaluate.policy.policies import Settings
from reward_data import Prompt
from rlhf.errors import UserError
from rlhf.evaluation.judge import Judged, judge_preference, question, verdict

JUDGE = "judge"  # its place beside the rewards
JUDGE_KEY = "RLHF_JUDGE_API_KEY"  # where it is another one than that of the policies
MOST_TOKENS = 1024  # of a judgement
KEPT = 10  # reasons


@dataclass
class Judgements:
    """Of two policies, by row; rows without two verdicts are missing."""

    judged: dict[int, Judged] = field(default_factory=dict)
    texts: dict[int, tuple[str, str]] = field(default_factory=dict)
    failed: int = 0  # rows with a response of both, but without two verdicts
    reasons: list[str] = field(default_factory=list)


def check_judge(settings: Settings, policies: Collection[str], rewards: Collection[str]) -> None:
    """UserError (2) for what is no endpoint, for a single policy, and for a reward of that name."""
    if settings.judge is None:
        return
    judge_endpoint(settings)
    if len(policies) < 2:
        raise UserError("--judge compares two policies or more; name another one")
    if JUDGE in rewards:
        raise UserError(f"--reward {JUDGE}: beside --judge another name is needed")


def judge_endpoint(settings: Settings) -> Endpoint:
    keys = (JUDGE_KEY, KEY)
    limits = {"deadline_s": settings.deadline_s, "parallel": settings.parallel}
    return Endpoint.parse(settings.judge or "", "--judge", keys=keys, **limits)


def judge_pairs(
    sampled: Mapping[str, Sampled], prompts: Sequence[Prompt], settings: Settings, bar: Progress
) -> dict[str, Judgements]:
    """By pair; nothing without a judge. UserError (2, 4, 8) where no judgement can come."""
    if settings.judge is None:
        return {}
    pairs = list(combinations(sampled, 2))
    task = bar.add_task("judge compares", total=2 * sum(len(rows_with_both(sampled[a], sampled[b])) for a, b in pairs))
    endpoint, advance = judge_endpoint(settings), partial(bar.advance, task)
    return {pair_name(a, b): judge_pair(endpoint, sampled[a], sampled[b], prompts, advance) for a, b in pairs}


def rows_with_both(a: Sampled, b: Sampled) -> list[int]:
    pairs = enumerate(zip(a.responses, b.responses, strict=True))
    return [row for row, (one, other) in pairs if one is not None and other is not None]


def judge_pair(
    endpoint: Endpoint, a: Sampled, b: Sampled, prompts: Sequence[Prompt], advance: Callable[[int], object]
) -> Judgements:
    rows = rows_with_both(a, b)
    bodies = [
        {"messages": question(prompts[row].messages, *shown), "temperature": 0.0, "max_tokens": MOST_TOKENS, "seed": 0}
        for row in rows
        for shown in _orders(a, b, row)
    ]
    found, answers = Judgements(), iter(endpoint.complete(bodies, advance))
    for row, first, second in zip(rows, answers, answers, strict=True):
        _add(found, row, first, second)
    return found


def _orders(a: Sampled, b: Sampled, row: int) -> list[tuple[str, str]]:
    one, other = a.responses[row], b.responses[row]
    assert one is not None and other is not None
    return [(one.text, other.text), (other.text, one.text)]


def _add(found: Judgements, row: int, first: Completion | Failure, second: Completion | Failure) -> None:
    if isinstance(first, Completion) and isinstance(second, Completion):
        found.texts[row] = (first.text, second.text)
        as_a, as_b = verdict(first.text), verdict(second.text)
        if as_a and as_b:
            found.judged[row] = Judged(as_a, as_b)
            return
        text = first.text if as_a is None else second.text
        reason = f"no verdict [[A]], [[B]] or [[C]], or several, in: … {text[-80:]!r}"
    else:
        reason = first.reason if isinstance(first, Failure) else second.reason if isinstance(second, Failure) else ""
    found.failed += 1
    found.reasons = [*found.reasons, reason][:KEPT]


def judge_metrics(own: Judgements, a: Sampled, b: Sampled, clusters: np.ndarray) -> dict[str, Any]:
    """What `pairs` of the report holds of the judge."""
    found: dict[str, Any] = {"failed": own.failed, "reasons": own.reasons}
    if rows := list(own.judged):
        lengths_N = column(a, "", rows, "length"), column(b, "", rows, "length")
        found |= judge_preference(list(own.judged.values()), lengths_N, clusters[rows])
    return found


def judgement_lines(pair: str, own: Judgements, samples: int) -> Iterator[dict[str, Any]]:
    """For judgements.jsonl: what the judge said where the response of the first policy was A, and where it was B."""
    for row, (as_a, as_b) in own.texts.items():
        judged = own.judged.get(row)
        yield {
            "pair": pair,
            "prompt": row // samples,
            "sample": row % samples,
            "verdicts": list(judged) if judged else None,
            "first_as_a": as_a,
            "first_as_b": as_b,
        }
