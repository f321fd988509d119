"""The display while stages run: one bar per stage with its main metric, and warnings below."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from rlhf.runs.context import read_progress

console = Console(highlight=False)
REFRESH_S = 0.5


class BarsWithWarnings(Progress):
    """Bars with lines below them, which stay when the bars have stopped."""

    warnings: tuple[str, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(line, style="yellow") for line in self.warnings)


class StageBars:
    """Bars that follow each stage's progress file. Without a terminal, one line per start, end and warning."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder
        self._bars = BarsWithWarnings(
            TextColumn("[bold]{task.description:<20}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[metrics]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bars.stop()

    def add(self, stage: str) -> None:
        self._tasks[stage] = self._bars.add_task(stage, total=None, metrics="starting …")
        if not console.is_terminal:
            console.print(f"{stage}: started")

    def refresh(self) -> None:
        for stage, task in self._tasks.items():
            if (state := read_progress(self.folder / stage)) is not None:
                self._bars.update(task, completed=state.done, total=state.total, metrics=_shown(state.metrics) or "…")
                for warning in state.warnings:
                    self.say_once(f"{stage}: warning: {warning}")

    def say_once(self, line: str) -> None:
        if line not in self._bars.warnings:
            self._bars.warnings += (line,)
            if not console.is_terminal:
                console.print(Text(line), soft_wrap=True)

    @contextmanager
    def followed(self, stage: str) -> Iterator[None]:
        """The bar of a stage that runs in this process."""
        self.add(stage)
        ended = threading.Event()
        thread = threading.Thread(target=lambda: self._follow(ended), daemon=True)
        thread.start()
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            ended.set()
            thread.join()
            self.finish(stage, outcome)

    def _follow(self, ended: threading.Event) -> None:
        while not ended.wait(REFRESH_S):
            self.refresh()

    def finish(self, stage: str, outcome: str) -> None:
        self.refresh()
        task = self._tasks.pop(stage)
        shown = self._bars.tasks[task].fields["metrics"]
        self._bars.update(task, metrics=f"{shown}  [green]{outcome}" if outcome == "done" else f"[red]{outcome}")
        self._bars.stop_task(task)
        if not console.is_terminal:
            elapsed = self._bars.tasks[task].finished_time or self._bars.tasks[task].elapsed or 0
            console.print(f"{stage}: {outcome} after {elapsed:.0f} s, {shown}")


def _shown(metrics: dict[str, float | None]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if value is not None)
