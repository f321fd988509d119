"""DIR/scores.jsonl: the scores of every model, a window of items at a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from launch.evaluate.scorers import Scored, Scorer
from launch.evaluate.windows import WindowFile
from launch.score import BadRows, refuse_unfit
from rlhf.errors import UserError
from rlhf.evaluation.items import Item, Refused

WINDOW = 512  # items: read, sorted by length and scored together, and all that is in memory of them
SHOWN = 10  # reasons for leaving rows out that a window keeps

Entries = Callable[[], Iterator[Item | Refused]]
Advance = Callable[[int], object]


class ScoreFile:
    def __init__(self, path: Path, digest: str, anew: bool = False) -> None:
        """Opens the file where it ended. If it holds scores of other models or data: UserError (2), or begun `anew`."""
        try:
            self._file = WindowFile.of(path, digest) if anew else WindowFile(path, digest)
        except ValueError:
            text = f"--out: {path} holds scores of other models, data or precision; name another folder"
            raise UserError(text) from None
        self.path = path
        self.windows = self._file.windows  # committed, by model

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
            lines, reasons = _lines(model, self.windows.get(model, 0), window, scored, bad_rows)
            self._file.commit(model, lines, left_out=len(reasons), reasons=reasons[:SHOWN])
            advance(len(window))

    def lines(self, model: str) -> Iterator[dict[str, Any]]:
        """The scored items of one model, in the order of the data."""
        return self._file.lines(model)

    def left_out(self, model: str) -> tuple[int, list[str]]:
        """How many rows have no score of `model`, and why some of them have none."""
        found = self._file.facts(model)
        return sum(line["left_out"] for line in found), [reason for line in found for reason in line["reasons"]][:SHOWN]


def _windows(entries: Iterator[Item | Refused], asked: deque[list[Item | Refused]]) -> Iterator[list[Item]]:
    """The items of one window after the other; `asked` gets each window whole."""
    while window := list(islice(entries, WINDOW)):
        asked.append(window)
        yield _items(window)


def _items(window: list[Item | Refused]) -> list[Item]:
    return [entry for entry in window if isinstance(entry, Item)]


def _lines(
    model: str, number: int, window: list[Item | Refused], scored: Scored, bad_rows: BadRows
) -> tuple[list[dict[str, Any]], list[str]]:
    """A line for each item that has scores, and why the others have none."""
    places = [place for place, entry in enumerate(window) if isinstance(entry, Item)]
    items = _items(window)
    refuse_unfit(scored.unfit, True, bad_rows)
    for n, scores in scored.scores.items():
        if not all(map(math.isfinite, scores)):
            raise UserError(f"{items[n].source}: {model} gives it a score that is not finite: {scores}", 4)
    lines = [
        {"row": number * WINDOW + places[n], **_facts(items[n]), "scores": scores}
        for n, scores in sorted(scored.scores.items())
    ]
    reasons = [f"{entry.source}: {entry.reason}" for entry in window if isinstance(entry, Refused)] + scored.unfit
    return lines, reasons


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
