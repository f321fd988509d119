"""What a stage knows about the place where it runs, and how it reports progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.runs.artifacts import Artifact, write_json

if TYPE_CHECKING:  # the driver reads progress and must not load torch for it
    import torch

    from rlhf.tracking import Tracker

PROGRESS = "progress.json"
WRITE_EVERY_S = 0.5


@dataclass(frozen=True)
class StageContext:
    stage: str  # "sft", "reward/<name>", "ppo"
    rank: int
    world_size: int
    device: torch.device
    folder: Path  # runs/<run>/<stage>, the same on all ranks
    inputs: Mapping[str, Artifact]  # stage name -> its artifact
    tracker: Tracker  # does nothing on all ranks but the first
    progress: Progress
    local: bool  # in one process, without a process group
    roles: tuple[str, ...] = ()  # of the data that the stage reads: "demonstrations", "preferences", "prompts"
    open_pool: Callable[[Path, tuple[Sequence[int], int], Any], Any] | None = None
    """Opens samplers on devices of their own: folder, (stop ids, pad id), capacity → Sampler. None: there is no Ray."""
    sequence_parallel: int = 1  # ranks after one another that read the same rows, each a slice of them

    @property
    def is_writer(self) -> bool:
        """True on the one rank that writes files, metrics and progress."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """How many (groups of) ranks read rows of their own."""
        return self.world_size // self.sequence_parallel

    @property
    def artifact_folder(self) -> Path:
        return self.folder / "artifact"

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"


class Progress:
    """Reports a stage's progress to the driver in `<folder>/progress.json`. Only the writer's rank writes."""

    def __init__(self, folder: Path, is_writer: bool) -> None:
        self._path = folder / PROGRESS
        self._is_writer = is_writer
        self._next_write = 0.0
        self._warnings: list[str] = []

    def warn(self, text: str) -> None:
        """Shows a line under the stage's bar from the next update on, which is written at once."""
        self._warnings.append(text)
        self._next_write = 0.0

    def update(self, done: int, total: int, **metrics: float) -> None:
        """`done` of `total` steps and the main metrics, e.g. loss=1.2. Written at most twice a second."""
        now = time.monotonic()
        if not self._is_writer or (now < self._next_write and done < total):
            return
        self._next_write = now + WRITE_EVERY_S
        self._path.parent.mkdir(parents=True, exist_ok=True)
        state = {"done": done, "total": total, "metrics": metrics, "warnings": self._warnings, "time": time.time()}
        write_json(self._path, state, durable=False)


@dataclass(frozen=True)
class ProgressState:
    done: int
    total: int
    metrics: dict[str, float | None]  # None: was not a finite number
    warnings: list[str]  # all since the stage started
    time: float  # seconds since 1970


def read_progress(folder: Path) -> ProgressState | None:
    """The last progress of the stage in `folder`; None before the first."""
    try:
        return ProgressState(**json.loads((folder / PROGRESS).read_text()))
    except FileNotFoundError:
        return None
