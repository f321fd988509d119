"""A cell of a sweep: an ordinary run that is driven with others, and records how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from launch import parent_run, pipeline
from launch.drive import DrivenRun
from rlhf.data import parsed
from rlhf.errors import UserError
from rlhf.tracking import Tracker


@dataclass(eq=False)
class Cell(DrivenRun):
    was_finished: bool = False  # before this command
    failure: UserError | None = None
    shared: dict[str, Path] = field(default_factory=dict)  # stage → where another cell made it
    tracker: Tracker | None = None  # while its run is open

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def is_over(self) -> bool:
        return not self.waiting and not self.running

    def starting(self) -> None:
        self._open()

    def close(self) -> None:
        """Writes its report if its stages are made; else records why they are not."""
        tracker = self._open()
        tracker.tags({f"shared.{stage}": str(folder) for stage, folder in self.shared.items()})
        try:
            if self.failure is None:
                pipeline.write_report(self.config, tracker, self.seconds)
        except Exception as error:  # noqa: BLE001  the other cells go on
            self.failure = error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}", 1)
        if self.failure is not None:
            parent_run.fail(self.config, tracker, self.failure)
        self.tracker = None

    def interrupt(self, error: BaseException) -> None:
        if self.tracker is not None:
            parent_run.fail(self.config, self.tracker, error)

    def _open(self) -> Tracker:
        """Late, so that a cell that waits for room is not said to run."""
        if self.tracker is None:
            parsed.write(self.config, self.data)
            self.tracker = parent_run.begin(self.config, self.data)
        return self.tracker
