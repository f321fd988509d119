"""What report.md and report.html show: tables, plots, and some of the responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.evaluate.page import Example, Page, short
from launch.evaluate.policy.judge import JUDGE
from launch.evaluate.policy.metrics import Sampled
from launch.evaluate.policy.plots import plots
from launch.evaluate.policy.tables import tables
from reward_data import Prompt

SHOWN = 6  # examples from either end

Report = Mapping[str, Any]


def page_of(report: Report, sampled: Mapping[str, Sampled], rows: Sequence[Prompt]) -> Page:
    settings = report["settings"]
    notes = [f"{name}: {found['model']}" for name, found in report["models"].items()]
    notes += [f"reward {name}: {reward}" for name, reward in report["rewards"].items()]
    if settings["judge"]:
        notes.append(f"judge: {settings['judge']}, both orders; where they disagree, it is a tie")
    notes.append(
        f"{report['prompts']} prompts, responses to each: {settings['samples']}, temperature {settings['temperature']:g}, "
        f"at most {settings['max_new_tokens']} tokens"
    )
    order, title = ranked(sampled, len(rows))
    return Page(
        title=f"Responses of {', '.join(report['models'])}",
        notes=notes,
        warnings=list(warnings(report)),
        tables=list(tables(report)),
        plots=plots(report),
        examples=[example(row, sampled, rows[row]) for row in order],
        examples_title=title,
    )


def warnings(report: Report) -> Iterator[str]:
    for name, found in report["models"].items():
        if count := found["left_out"]["responses"]:
            yield f"{name}: {count} responses left out, for instance {found['left_out']['reasons'][0]}"
        for reward, count in found["failed"].items():
            if count:
                yield f"{name}: {count} of {found['responses']} responses have no score by {reward}"
    yield from judge_warnings(report)


def judge_warnings(report: Report) -> Iterator[str]:
    for pair, found in report["pairs"].items():
        judge = found.get(JUDGE) or {}
        if judge.get("failed"):
            yield f"{pair}: {judge['failed']} judgements left out, for instance {judge['reasons'][0]}"
        bias = judge.get("first_shown")
        if bias and not bias["low"] <= 0.5 <= bias["high"]:
            yield f"{pair}: the judge prefers the response shown {'first' if bias['value'] > 0.5 else 'second'}"


def ranked(sampled: Mapping[str, Sampled], count: int) -> tuple[list[int], str]:
    """Rows from both ends of the first reward: of the first policy's score less the second's, or of its score alone."""
    policies = list(sampled.values())
    reward = next(iter(policies[0].scores), None)
    if reward is None:
        return list(range(min(count, 2 * SHOWN))), "Responses"
    values: dict[int, float] = {}
    for row, scores in enumerate(zip(*(policy.scores[reward] for policy in policies[:2]), strict=True)):
        known = [score for score in scores if score is not None]
        if len(known) == len(scores):
            values[row] = known[0] - sum(known[1:])
    order = sorted(values, key=lambda row: values[row])
    chosen = order if len(order) <= 2 * SHOWN else [*order[:SHOWN], *order[-SHOWN:]]
    names = list(sampled)
    end = f"{names[0]} is worst and best against {names[1]}" if len(names) > 1 else "the score is lowest and highest"
    return chosen, f"Responses where {end} by {reward}"


def example(row: int, sampled: Mapping[str, Sampled], prompt: Prompt) -> Example:
    texts = {"prompt": short("\n".join(f"{message.role}: {message.content}" for message in prompt.messages))}
    for name, policy in sampled.items():
        response = policy.responses[row]
        if response is not None:
            values = [f"{key} {score[row]:.3g}" for key, score in policy.scores.items() if score[row] is not None]
            label = ", ".join([name, *values, *([] if response.finished else ["cut off"])])
            texts[label] = short(response.text) or "(empty)"
    return Example(short(prompt.messages[-1].content, 100), texts)
