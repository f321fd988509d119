"""`rlhf evaluate policy`: what several policies say to the same prompts, and what it is worth."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import reward_data
from launch.evaluate import output
from launch.evaluate.inputs import model_names
from launch.evaluate.metrics import as_json, flat
from launch.evaluate.policy.metrics import Sampled, model_metrics, pair_metrics
from launch.evaluate.policy.page import page_of, warnings
from launch.evaluate.policy.policies import ModelPolicy, Response, Settings
from launch.evaluate.policy.rewards import check_rewards, open_scorer
from launch.evaluate.policy.tables import tables
from launch.model_folder import model_folder
from launch.score import bar_columns, refuse_unfit
from reward_data import Prompt
from rlhf.runs.artifacts import write_atomic

DEFAULT = Settings()


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
    folders = {name: model_folder(model) for name, model in policies.items()}
    rows = [prompt for prompt in prompts for _ in range(settings.samples)]
    sampled: dict[str, Sampled] = {}
    with Progress(*bar_columns(), console=Console(stderr=True), transient=True) as bar:
        for name, folder in folders.items():
            task = bar.add_task(f"{name} responds", total=len(rows))
            sampled[name] = sample(folder, policies[name], rows, settings, partial(bar.advance, task))
        for name, reward in rewards.items():
            task = bar.add_task(f"{name} scores", total=len(policies))
            scorer = open_scorer(name, reward, settings)
            for one in sampled.values():
                one.scores[name] = score(scorer, one, rows)
                bar.advance(task)
    report = {
        "models": {name: model_metrics(one, rows) for name, one in sampled.items()},
        "pairs": pair_metrics(sampled, rows),
        "rewards": dict(rewards),
        "prompts": len(prompts),
        "settings": asdict(settings),
    }
    report = as_json(report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_responses(out / "responses.jsonl", sampled, rows, settings.samples)
        output.write(out, report, page_of(report, sampled, rows))
    return report


def sample(folder: Path, model: str, rows: Sequence[Prompt], settings: Settings, advance: Any) -> Sampled:
    """A response to each row that the policy can read. The id of a row is its place, the same for every policy."""
    with closing(ModelPolicy(folder, settings)) as policy:
        encoded, unfit = policy.encode(rows)
        there = [row for row, prompt in enumerate(encoded) if prompt is not None]
        refuse_unfit(unfit, bool(there), settings.bad_rows)
        advance(len(unfit))
        responses: list[Response | None] = [None] * len(rows)
        for row, response in zip(
            there, policy.respond([prompt for prompt in encoded if prompt is not None], there, advance), strict=True
        ):
            responses[row] = response
    return Sampled(model, responses, list(dict.fromkeys(unfit)))


def score(scorer: Any, sampled: Sampled, rows: Sequence[Prompt]) -> list[float | None]:
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
    policies = dict(zip(model_names(models), models, strict=True))
    report = evaluate(policies, load_prompts(prompts, settings.bad_rows), rewards, settings, out)
    output.track(out, policies, metrics_of(report), tracking_uri)
    return report


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The values for MLflow: of one policy by their keys, of several with its name, or the pair's, before them."""
    several = len(report["models"]) > 1
    parts = {**report["models"], **{name.replace(" ", "_"): found for name, found in report["pairs"].items()}}
    return {
        f"{name}/{key}" if several else key: value
        for name, found in parts.items()
        for key, value in flat({key: part for key, part in found.items() if key != "model"}).items()
    }


def write_responses(path: Path, sampled: Mapping[str, Sampled], rows: Sequence[Prompt], samples: int) -> None:
    lines = []
    for name, one in sampled.items():
        for row, response in enumerate(one.responses):
            if response is not None:
                lines.append(
                    {
                        "model": name,
                        "prompt": row // samples,
                        "sample": row % samples,
                        "tag": rows[row].tag,
                        "messages": [{"role": m.role, "content": m.content} for m in rows[row].messages],
                        "response": response.text,
                        "length": response.length,
                        "finished": response.finished,
                        "scores": {reward: scores[row] for reward, scores in one.scores.items()},
                    }
                )
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def show(report: Mapping[str, Any], out: Path) -> None:
    output.show(out, tables(report), warnings(report), f"responses: {out / 'responses.jsonl'}")
