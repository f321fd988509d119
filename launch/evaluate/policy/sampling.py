"""The responses of all policies, kept in DIR/samples.jsonl a window at a time, so that sampling goes on after a kill."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from rich.progress import Progress

from launch.evaluate.inputs import model_digest
from launch.evaluate.policy.metrics import Sampled
from launch.evaluate.policy.policies import Policy, Response, Settings, is_endpoint, open_policy
from launch.evaluate.windows import WindowFile
from launch.model_folder import model_folder
from launch.score import refuse_unfit
from reward_data import Prompt
from rlhf.runs.artifacts import digest_of

FILE = "samples.jsonl"
SHOWN = 10  # reasons for missing responses that a window keeps
BATCHES = 4  # in a window: continuous batching is slow at its end

Arms = Mapping[str, Mapping[float, Sampled]]
"""Policy → temperature → what was sampled."""


def respond(
    policies: Mapping[str, str], rows: Sequence[Prompt], settings: Settings, out: Path | None, bar: Progress
) -> Arms:
    """One model in memory at a time. The id of a row is its place, the same for all. UserError (3) for prompts that a
    policy cannot hold, unless they are skipped.
    """
    temperatures, arms = temperatures_of(settings), {}
    with _file(out, policies, rows, settings) as file:
        for name, model in policies.items():
            task = bar.add_task(f"{name} responds", total=len(rows) * len(temperatures))
            keys = {temperature: f"{name} at {temperature!r}" for temperature in temperatures}
            done = {key: file.windows.get(key, 0) * window_of(settings) for key in keys.values()}
            bar.advance(task, sum(min(count, len(rows)) for count in done.values()))
            if any(count < len(rows) for count in done.values()):
                with closing(open_policy(model, settings)) as policy:
                    unfit = policy.unfit(rows)
                    refuse_unfit(unfit, len(unfit) < len(rows), settings.bad_rows)
                    for temperature, key in keys.items():
                        _fill(file, key, policy, (rows, temperature, settings), partial(bar.advance, task))
            arms[name] = {
                temperature: _read(file, key, model, len(rows), settings) for temperature, key in keys.items()
            }
    return arms


def temperatures_of(settings: Settings) -> list[float]:
    return list(dict.fromkeys([settings.temperature, *settings.more_temperatures]))


def window_of(settings: Settings) -> int:
    """Rows that are kept or lost together."""
    return BATCHES * settings.batch_size


@contextmanager
def _file(
    out: Path | None, policies: Mapping[str, str], rows: Sequence[Prompt], settings: Settings
) -> Iterator[WindowFile]:
    """The file in `out`, begun anew if it holds samples of something else; a temporary one without `out`."""
    models = {
        name: model if is_endpoint(model) else model_digest(model_folder(model)) for name, model in policies.items()
    }
    prompts = [[[message.role, message.content] for message in prompt.messages] for prompt in rows]
    limits = settings.max_new_tokens, settings.precision, settings.bad_rows
    digest = digest_of([models, prompts, settings.seed, window_of(settings), *limits])
    with tempfile.TemporaryDirectory() as folder:
        path = (out or Path(folder)) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        yield WindowFile.of(path, digest)


def _fill(
    file: WindowFile,
    key: str,
    policy: Policy,
    what: tuple[Sequence[Prompt], float, Settings],
    advance: Callable[[int], object],
) -> None:
    """Samples the windows that are missing."""
    rows, temperature, settings = what
    size = window_of(settings)
    for start in range(file.windows.get(key, 0) * size, len(rows), size):
        part = rows[start : start + size]
        found = policy.respond(part, range(start, start + len(part)), temperature, advance)
        there = [(start + n, response) for n, response in enumerate(found.rows) if response is not None]
        file.commit(key, [{"row": row, **asdict(response)} for row, response in there], reasons=found.reasons[:SHOWN])


def _read(file: WindowFile, key: str, model: str, count: int, settings: Settings) -> Sampled:
    responses: list[Response | None] = [None] * count
    for line in file.lines(key):
        responses[line["row"]] = Response(**{field.name: line[field.name] for field in fields(Response)})
    reasons = dict.fromkeys(reason for window in file.facts(key) for reason in window["reasons"])
    return Sampled(model, settings.samples, responses, list(reasons))
