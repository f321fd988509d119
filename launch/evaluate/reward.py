"""`rlhf evaluate reward`: what the scores of reward models are worth on pairs, benchmarks and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import reward_data
from launch.evaluate import output
from launch.evaluate.checks import TEXTS
from launch.evaluate.inputs import Inputs, sort_inputs
from launch.evaluate.metrics import (
    BAG_OF_WORDS,
    Margins,
    agreements,
    as_json,
    model_metrics,
    worst_rows,
)
from launch.evaluate.page import Example, Page, short
from launch.evaluate.plots import plots
from launch.evaluate.scorers import ModelScorer, RewardScorer, WordScorer
from launch.evaluate.scores import ScoreFile
from launch.evaluate.tables import tables
from launch.score import BadRows, bar_columns
from reward_data import DataError
from rlhf.evaluation.bag_of_words import BagOfWords
from rlhf.evaluation.items import Item, Refused, read_items
from rlhf.evaluation.pairs import pairs_of
from rlhf.runs.artifacts import digest_of


@dataclass(frozen=True)
class Mistake:
    model: str
    source: str
    margin: float
    texts: Mapping[str, str]  # prompt, chosen, rejected


@dataclass(frozen=True)
class Options:
    batch_size: int
    precision: str
    bad_rows: BadRows
    train: Sequence[str]  # pairs on which the bag of words is fitted
    tracking_uri: str | None
    workers: int = 1
    ray_address: str | None = None


def evaluate_reward(arguments: Sequence[str], out: Path, options: Options) -> dict[str, Any]:
    """Evaluate the models among `arguments` on the data among them. Writes scores.jsonl, report.json, report.md and
    report.html into `out` and returns the report. UserError (2, 3, 4, 5) or DataError for what cannot be evaluated.
    """
    inputs = sort_inputs(arguments)
    output.check_folder(out)
    report, _ = evaluate(inputs, out, options)
    track(out, inputs, report, options)
    return report


def evaluate(inputs: Inputs, out: Path, options: Options, anew: bool = False) -> tuple[dict[str, Any], ScoreFile]:
    """Writes the report, which is returned with the scores. `anew`: scores of other models or data in `out` may go."""
    count = count_entries(inputs.files, options.bad_rows)
    out.mkdir(parents=True, exist_ok=True)
    digest = digest_of([inputs.digest(), options.precision, options.bad_rows, list(options.train)])
    scores = ScoreFile(out / "scores.jsonl", digest, anew)
    checks = score_all(scores, inputs, count, options)
    report, page = build(scores, inputs, checks)
    output.write(out, report, page)
    return report, scores


def entries(files: Sequence[Path]) -> Iterator[Item | Refused]:
    for file in files:
        yield from read_items(file)


def count_entries(files: Sequence[Path], bad_rows: BadRows) -> int:
    """Reads all data once, so that a bad row is told before a model is opened. DataError (3) for one, unless skipped."""
    count, refused = 0, []
    for entry in entries(files):
        count += 1
        if isinstance(entry, Refused):
            refused.append(f"{entry.source}: {entry.reason}")
    if refused and bad_rows == "refuse":
        raise DataError(
            "\n  ".join([f"{len(refused)} bad rows; fix them, or leave them out: --bad-rows skip", *refused[:10]])
        )
    return count


def score_all(scores: ScoreFile, inputs: Inputs, count: int, options: Options) -> dict[str, dict[str, Any]]:
    """Scores what has no score yet; the checks of each model."""
    read, checks = partial(entries, inputs.files), {}
    with (
        opener(scores.path.parent, options) as open_model,
        Progress(*bar_columns(), console=Console(stderr=True), transient=True) as bar,
    ):
        for name, folder in inputs.models.items():
            task = bar.add_task(name, total=count)
            scorer = open_model(folder)
            some = list(islice((entry for entry in read() if isinstance(entry, Item)), TEXTS))
            checks[name] = scorer.check(some)
            scores.fill(name, read, lambda scorer=scorer: scorer, options.bad_rows, partial(bar.advance, task))
        if options.train:
            task = bar.add_task("bag of words", total=count)
            make = partial(fitted_words, options.train, options.bad_rows)
            scores.fill(BAG_OF_WORDS, read, make, options.bad_rows, partial(bar.advance, task))
    return checks


@contextmanager
def opener(out: Path, options: Options) -> Iterator[Callable[[Path], RewardScorer]]:
    """How a model's folder becomes a scorer: in this process, or on Ray where there are several workers or an address."""
    if options.workers == 1 and options.ray_address is None:
        yield lambda folder: ModelScorer(folder, options.batch_size, options.precision)
        return
    from launch import signals
    from launch.connection import connection
    from launch.evaluate.pool import PoolScorer

    with signals.handled(), connection(options.ray_address, out / "ray"):
        yield lambda folder: PoolScorer(options.workers, folder, options.batch_size, options.precision)


def fitted_words(paths: Sequence[str], bad_rows: BadRows) -> WordScorer:
    loaded = [reward_data.load("preferences", path, bad_rows=bad_rows) for path in paths]
    return WordScorer(BagOfWords().fit((row.chosen, row.rejected) for part in loaded for row in part.rows))


def build(scores: ScoreFile, inputs: Inputs, checks: Mapping[str, Any]) -> tuple[dict[str, Any], Page]:
    words = Margins.of(pairs_of(scores.lines(BAG_OF_WORDS))) if BAG_OF_WORDS in scores.windows else None
    models: dict[str, dict[str, Any]] = {}
    margins: dict[str, Margins] = {}
    for name in inputs.models:
        found, own = model_metrics(scores, name, words)
        models[name] = as_json({"model": str(inputs.models[name]), **found, "checks": checks[name]})
        if own is not None:
            margins[name] = own
    agreed = as_json(agreements(margins, scores))
    mistakes = worst_mistakes(margins, inputs.files)
    for name, report in models.items():
        report["worst"] = [
            {"source": one.source, "margin": one.margin, **one.texts} for one in mistakes if one.model == name
        ]
    first = next(iter(models.values()))
    report = {**first, "data": [str(file) for file in inputs.files], "models": models, "agreement": agreed}
    on_pairs = {name: found for name, found in models.items() if found["pairs"]}
    page = Page(
        title=f"Evaluation of {', '.join(models)}",
        notes=[
            *(f"{name}: {found['model']}, {found['pairs']} pairs" for name, found in models.items()),
            f"data: {', '.join(map(str, inputs.files))}",
        ],
        warnings=list(warnings(models)),
        tables=list(tables(models, agreed)),
        plots=plots(on_pairs) if on_pairs else {},
        examples=[Example(f"{one.model}: margin {one.margin:.2f}, {one.source}", one.texts) for one in mistakes],
        examples_title="Worst mistakes",
    )
    return report, page


def warnings(models: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, report in models.items():
        yield from (f"{name}: {text}" for text in report["checks"]["warnings"])
        if rows := report["left_out"]["rows"]:
            yield f"{name}: {rows} rows left out, for instance {report['left_out']['reasons'][0]}"


def worst_mistakes(margins: Mapping[str, Margins], files: Sequence[Path]) -> list[Mistake]:
    """The pairs that each model ranks most wrongly, with their texts, which are read once more."""
    wanted = {name: worst_rows(own) for name, own in margins.items()}
    rows = {row for own in wanted.values() for row in own}
    texts: dict[int, Item] = {}
    for number, entry in enumerate(entries(files)):
        if number in rows and isinstance(entry, Item):
            texts[number] = entry
            if len(texts) == len(rows):
                break
    return [
        Mistake(
            model=name,
            source=texts[row].source,
            margin=margin,
            texts={
                "prompt": short("\n".join(f"{message.role}: {message.content}" for message in texts[row].prompt)),
                "chosen": short(texts[row].responses[0]),
                "rejected": short(texts[row].responses[1]),
            },
        )
        for name, own in wanted.items()
        for row, margin in own.items()
    ]


def track(out: Path, inputs: Inputs, report: Mapping[str, Any], options: Options) -> None:
    """The same metrics in MLflow: those of one model by their keys, of several with the model's name before them."""
    parts = {
        name: {key: part for key, part in found.items() if key != "worst"} for name, found in report["models"].items()
    }
    models = {name: str(folder) for name, folder in inputs.models.items()}
    output.track(out, models, output.with_names(parts), options.tracking_uri)


def show(report: Mapping[str, Any], out: Path) -> None:
    """The tables in the terminal."""
    shown = tables(report["models"], report["agreement"])
    output.show(out, shown, warnings(report["models"]), f"scores: {out / 'scores.jsonl'}")
