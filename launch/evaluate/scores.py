"""DIR/scores.jsonl: the scores of every model, a window of items at a time.

The first line tells of which models and data they are. A window ends with a line that commits it: after a kill the
windows that have one are kept, and scoring goes on behind them.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from launch.evaluate.scorers import Scored, Scorer
from launch.score import BadRows, refuse_unfit
from rlhf.errors import UserError
from rlhf.evaluation.items import Item, Refused
from rlhf.tracking.jsonl import read_lines

WINDOW = 512  # items: read, sorted by length and scored together, and all that is in memory of them
SHOWN = 10  # reasons for leaving rows out that a window keeps

Entries = Callable[[], Iterator[Item | Refused]]
Advance = Callable[[int], object]


class ScoreFile:
    def __init__(self, path: Path, digest: str) -> None:
        """Opens the file where it ended. UserError (2) if it holds scores of other models or data."""
        self.path = path
        self.windows: dict[str, int] = {}  # committed, by model
        end = 0
        for line, offset in read_lines(path):
            if not end and line.get("digest") != digest:
                raise UserError(f"--out: {path} holds scores of other models, data or precision; name another folder")
            if "window" in line:
                self.windows[line["model"]] = line["window"] + 1
            if "window" in line or "digest" in line:
                end = offset
        with path.open("ab") as stream:
            stream.truncate(end)
        if not end:
            self._append([{"digest": digest}])

    def fill(
        self, model: str, entries: Entries, make: Callable[[], Scorer], bad_rows: BadRows, advance: Advance
    ) -> None:
        """Scores what has no score of `model` yet; `make` opens the model only if there is something."""
        rest, done = iter(entries()), self.windows.get(model, 0)
        advance(sum(1 for _ in islice(rest, done * WINDOW)))
        if (first := next(rest, None)) is None:
            return
        asked: deque[list[Item | Refused]] = deque()  # windows whose scores are not there yet
        for scored in make().map(_windows(chain([first], rest), asked)):
            window = asked.popleft()
            self._append(_lines(model, done, window, scored, bad_rows))
            done += 1
            self.windows[model] = done
            advance(len(window))

    def lines(self, model: str) -> Iterator[dict[str, Any]]:
        """The scored items of one model, in the order of the data."""
        return (line for line, _ in read_lines(self.path) if line.get("model") == model and "scores" in line)

    def left_out(self, model: str) -> tuple[int, list[str]]:
        """How many rows have no score of `model`, and why some of them have none."""
        found = [line for line, _ in read_lines(self.path) if line.get("model") == model and "window" in line]
        return sum(line["left_out"] for line in found), [reason for line in found for reason in line["reasons"]][:SHOWN]

    def _append(self, lines: list[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("ab") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())


def _windows(entries: Iterator[Item | Refused], asked: deque[list[Item | Refused]]) -> Iterator[list[Item]]:
    """The items of one window after the other; `asked` gets each window whole."""
    while window := list(islice(entries, WINDOW)):
        asked.append(window)
        yield _items(window)


def _items(window: list[Item | Refused]) -> list[Item]:
    return [entry for entry in window if isinstance(entry, Item)]


def _lines(
    model: str, number: int, window: list[Item | Refused], scored: Scored, bad_rows: BadRows
) -> list[Mapping[str, Any]]:
    """A line for each item that has scores, and the one that commits the window."""
    places = [place for place, entry in enumerate(window) if isinstance(entry, Item)]
    items = _items(window)
    refuse_unfit(scored.unfit, True, bad_rows)
    for n, scores in scored.scores.items():
        if not all(map(math.isfinite, scores)):
            raise UserError(f"{items[n].source}: {model} gives it a score that is not finite: {scores}", 4)
    lines = [
        {"model": model, "row": number * WINDOW + places[n], **_facts(items[n]), "scores": scores}
        for n, scores in sorted(scored.scores.items())
    ]
    reasons = [f"{entry.source}: {entry.reason}" for entry in window if isinstance(entry, Refused)] + scored.unfit
    return [*lines, {"model": model, "window": number, "left_out": len(reasons), "reasons": reasons[:SHOWN]}]


def _facts(item: Item) -> dict[str, Any]:
    """What the report needs to know of an item besides its scores."""
    facts = {
        "source": item.source,
        "file": item.file,
        "form": item.form,
        "prompt": item.prompt_digest,
        "turns": item.turns,
        "lengths": [len(response) for response in item.responses],
        "rating": item.rating,
        "tag": item.tag,
        "subset": item.subset,
    }
    if item.form == "best_of":
        facts |= {"name": item.name, "correct": item.correct}
    if item.form == "list":
        facts |= {"judged": item.judged}
    return facts
