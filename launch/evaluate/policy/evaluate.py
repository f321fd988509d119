"""`rlhf evaluate policy`: what several policies say to the same prompts, and what it is worth."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import reward_data
from launch.evaluate import output
from launch.evaluate.inputs import model_names
from launch.evaluate.metrics import as_json
from launch.evaluate.policy.judge import (
    JUDGE,
    Judgements,
    check_judge,
    judge_metrics,
    judge_pairs,
    judgement_lines,
)
from launch.evaluate.policy.metrics import Sampled, clusters_of, model_metrics, pair_metrics, pair_name
from launch.evaluate.policy.page import page_of, warnings
from launch.evaluate.policy.policies import DEFAULT, Settings, check_policy, endpoint_of, is_endpoint
from launch.evaluate.policy.reference import Reference
from launch.evaluate.policy.rewards import RefusalScorer, Scorer, check_rewards, open_scorer
from launch.evaluate.policy.sampling import Arms, respond
from launch.evaluate.policy.tables import tables
from launch.evaluate.policy.tasks import check_tasks, run_tasks
from launch.score import bar_columns
from reward_data import Prompt
from rlhf.runs.artifacts import write_atomic


def evaluate(
    policies: Mapping[str, str],
    prompts: Sequence[Prompt],
    rewards: Mapping[str, str],
    settings: Settings = DEFAULT,
    out: Path | None = None,
) -> dict[str, Any]:
    """The report on policies by name, each a model's folder or hub name, with rewards by name, each a reward model or
    `module:function`. It is what report.json holds: docs/metrics.md defines its keys.

    `out`: a folder for the report and the responses. UserError (2, 3, 4, 5) for what cannot be evaluated.
    """
    check_rewards(rewards)
    check_judge(settings, policies, rewards)
    check_tasks(settings, list(policies.values()))
    for model in policies.values():
        check_policy(model, settings)
    rows = [prompt for prompt in prompts for _ in range(settings.samples)]
    with Progress(*bar_columns(), console=Console(stderr=True), transient=True) as bar:
        arms = respond(policies, rows, settings, out, bar)
        measure(arms, rewards, rows, settings, bar)
        sampled = {name: of_policy[settings.temperature] for name, of_policy in arms.items()}
        judgements = judge_pairs(sampled, rows, settings, bar)
    report = {
        "models": {name: metrics_of_model(of_policy, rows, settings) for name, of_policy in arms.items()},
        "pairs": pairs_of(sampled, judgements, rows),
        "rewards": dict(rewards),
        "prompts": len(prompts),
        "settings": asdict(settings),
    }
    for name, model in policies.items() if settings.tasks else ():
        report["models"][name]["tasks"] = run_tasks(model, settings)
    report = as_json(report)
    if out is not None:
        write_responses(out / "responses.jsonl", arms, rows)
        if judgements:
            write_judgements(out / "judgements.jsonl", judgements, settings.samples)
        output.write(out, report, page_of(report, sampled, rows))
    return report


def measure(arms: Arms, rewards: Mapping[str, str], rows: Sequence[Prompt], settings: Settings, bar: Progress) -> None:
    """Scores, KL and refusals of all responses, one model in memory at a time."""
    everything = [(temperature, one) for of_policy in arms.values() for temperature, one in of_policy.items()]
    for name, reward in rewards.items():
        task = bar.add_task(f"{name} scores", total=len(everything))
        scorer = open_scorer(name, reward, settings)
        for _, one in everything:
            one.scores[name] = score(scorer, one, rows)
            bar.advance(task)
    refusals = RefusalScorer(settings.refusal)
    for _, one in everything:
        one.refused = score(refusals, one, rows)
    if settings.reference is not None:
        task = bar.add_task("reference reads", total=len(everything))
        reference = Reference(settings.reference, settings)
        for temperature, one in everything:
            one.kl = reference.kl(one.responses, temperature, one.model)
            bar.advance(task)


def pairs_of(
    sampled: Mapping[str, Sampled], judgements: Mapping[str, Judgements], rows: Sequence[Prompt]
) -> dict[str, dict[str, Any]]:
    """By rewards and by the judge."""
    found, clusters = pair_metrics(sampled, rows), clusters_of(rows)
    for a, b in combinations(sampled, 2) if judgements else ():
        own = judgements[pair_name(a, b)]
        found[pair_name(a, b)][JUDGE] = judge_metrics(own, sampled[a], sampled[b], clusters)
    return found


def metrics_of_model(of_policy: Mapping[float, Sampled], rows: Sequence[Prompt], settings: Settings) -> dict[str, Any]:
    by_temperature = {f"{t:g}": model_metrics(one, rows) for t, one in sorted(of_policy.items())}
    found = dict(by_temperature[f"{settings.temperature:g}"])
    return found | ({"by_temperature": by_temperature} if len(by_temperature) > 1 else {})


def score(scorer: Scorer, sampled: Sampled, rows: Sequence[Prompt]) -> list[float | None]:
    there = [(row, response) for row, response in enumerate(sampled.responses) if response is not None]
    found: list[float | None] = [None] * len(rows)
    scores = scorer.score([rows[row] for row, _ in there], [response for _, response in there])
    for (row, _), value in zip(there, scores, strict=True):
        found[row] = value if value is not None and math.isfinite(value) else None
    return found


def load_prompts(paths: Sequence[str], bad_rows: Any = "refuse") -> list[Prompt]:
    """The prompts of files, folders, hub data sets or `shipped` (its held-out prompts). DataError for bad rows."""
    found: list[Prompt] = []
    for path in paths:
        split = "held_out" if path == "shipped" else None
        loaded = reward_data.load("prompts", reward_data.Source(path, split=split), bad_rows=bad_rows)
        found += loaded.rows
        for reason in [*loaded.findings, *loaded.refused]:
            print(f"prompts: {reason}", file=sys.stderr)
    return found


def evaluate_policy(
    models: Sequence[str],
    prompts: Sequence[str],
    rewards: Mapping[str, str],
    settings: Settings,
    out: Path,
    tracking_uri: str | None,
) -> dict[str, Any]:
    """The command: files of prompts, a folder for the report, metrics in MLflow."""
    output.check_folder(out)
    policies = dict(zip(policy_names(models), models, strict=True))
    report = evaluate(policies, load_prompts(prompts, settings.bad_rows), rewards, settings, out)
    output.track(out, policies, metrics_of(report), tracking_uri)
    return report


def policy_names(models: Sequence[str]) -> list[str]:
    """As `model_names`; an endpoint is called like its model."""
    return model_names([endpoint_of(model).model if is_endpoint(model) else model for model in models])


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The values for MLflow: of one policy by their keys, of several with its name, or the pair's, before them."""
    parts = {**report["models"], **{name.replace(" ", "_"): found for name, found in report["pairs"].items()}}
    return output.with_names(
        {name: {key: part for key, part in found.items() if key != "model"} for name, found in parts.items()}
    )


def write_responses(path: Path, arms: Arms, rows: Sequence[Prompt]) -> None:
    lines = (
        line
        for name, of_policy in arms.items()
        for temperature, one in of_policy.items()
        for line in response_lines(name, temperature, one, rows)
    )
    write_lines(path, lines)


def write_judgements(path: Path, judgements: Mapping[str, Judgements], samples: int) -> None:
    write_lines(path, (line for pair, own in judgements.items() for line in judgement_lines(pair, own, samples)))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def response_lines(name: str, temperature: float, sampled: Sampled, rows: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    for row, response in enumerate(sampled.responses):
        if response is not None:
            yield {
                "model": name,
                "temperature": temperature,
                "prompt": row // sampled.samples,
                "sample": row % sampled.samples,
                "tag": rows[row].tag,
                "messages": [{"role": m.role, "content": m.content} for m in rows[row].messages],
                "response": response.text,
                "length": response.length,
                "finished": response.finished,
                "scores": {reward: scores[row] for reward, scores in sampled.scores.items()},
                "refused": None if sampled.refused is None else bool(sampled.refused[row]),
                "kl": None if sampled.kl is None else sampled.kl[row],
            }


def show(report: Mapping[str, Any], out: Path) -> None:
    output.show(out, tables(report), warnings(report), f"responses: {out / 'responses.jsonl'}")
