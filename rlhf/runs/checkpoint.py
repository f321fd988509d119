"""Checkpoints: whole or not there. A partial one is never taken for a whole one, and the last two whole ones are kept.

Random numbers need no place in them: every draw is keyed by seed, iteration, prompt and position.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.runs.artifacts import write_json

KEPT = 2
STATE = "state.json"


class Part(Protocol):
    """What has a folder of its own in a checkpoint, an engine for instance. Every rank saves and loads its share."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save(folder: Path, iteration: int, parts: Mapping[str, Part], state: dict[str, Any]) -> None:
    """Writes `folder/iteration-N`: all that a PPO stage needs to go on. All ranks must call it."""
    target = folder / f"iteration-{iteration:06d}"

    def begin() -> None:
        _remove(target)
        target.mkdir(parents=True)

    collectives.rank_zero_only(begin, f"making room for {target}")
    for name, part in parts.items():
        part.save(target / name)
    commit(target, state | {"iteration": iteration, "world_size": collectives.world_size()})


def commit(target: Path, state: dict[str, Any]) -> None:
    """Says that every rank has written its part of `target`, and lets go of older checkpoints. All ranks must call it.

    `state.json` is written last, so its existence means whole.
    """

    def finish() -> None:
        write_json(target / STATE, state)
        for old in complete(target.parent)[:-KEPT]:
            _remove(old)

    collectives.barrier()
    collectives.rank_zero_only(finish, f"sealing {target} and removing older checkpoints")


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path.parent for path in folder.glob(f"*/{STATE}")), key=number)


def number(checkpoint: Path) -> int:
    """The iteration or step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint that the first rank sees; partial ones are removed. All ranks must call it.

    UserError (5), on every rank, where one of them does not see it.
    """

    def choose() -> Path | None:
        found = complete(folder)
        for partial in {*folder.glob("iteration-*"), *folder.glob("checkpoint-*")} - {*found}:
            shutil.rmtree(partial)
        return found[-1] if found else None

    chosen = collectives.rank_zero_only(choose, f"removing partial checkpoints from {folder}")
    missing = [
        rank for rank, there in enumerate(collectives.gather_objects(not chosen or _sealed(chosen))) if not there
    ]
    if missing:
        raise UserError(
            f"{chosen} is not there for rank {missing[0]}: runs_dir must be a folder that all nodes share", 5
        )
    return chosen


def restore(folder: Path, parts: Mapping[str, Part]) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint of `save` into `parts` and returns its state; None when there is none."""
    found = newest(folder)
    if found is None:
        return None
    for name, part in parts.items():
        part.load(found / name)
    return collectives.broadcast_result(lambda: _state(found))


def best_folder(folder: Path, iteration: int) -> Path:
    """Where the policy of an iteration is kept that was the best so far. Each has its own: a checkpoint may go back to
    an older one."""
    return folder / f"best-{iteration:06d}"


def forget_bests(folder: Path, current: int) -> None:
    """Removes the kept policies that neither a whole checkpoint nor the run, whose best is `current`, still names."""
    named = {current, *(_state(path)["best_iteration"] for path in complete(folder))}
    for path in {*folder.glob("best-*")} - {best_folder(folder, iteration) for iteration in named}:
        shutil.rmtree(path)


def _sealed(checkpoint: Path) -> bool:
    return (checkpoint / STATE).is_file()


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())


def _remove(checkpoint: Path) -> None:
    """What says that it is whole goes first: a removal may be broken off too."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
