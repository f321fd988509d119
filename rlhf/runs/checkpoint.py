"""Checkpoints, which are committed by their last file. Partial ones are removed, and the last two complete ones kept.

They hold no random state: every draw is keyed by seed, iteration, prompt and position.
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
    """What has its own folder in a checkpoint, such as an engine. Every rank saves and loads its shard."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save(folder: Path, iteration: int, parts: Mapping[str, Part], state: dict[str, Any]) -> None:
    """Writes `folder/iteration-N`: all that PPO needs to resume. All ranks must call it."""
    target = folder / f"iteration-{iteration:06d}"

    def begin() -> None:
        _remove(target)
        target.mkdir(parents=True)

    collectives.rank_zero_only(begin, f"clearing {target}")
    for name, part in parts.items():
        part.save(target / name)
    commit(target, state | {"iteration": iteration, "world_size": collectives.world_size()})


def commit(target: Path, state: dict[str, Any]) -> None:
    """Commits `target` when every rank has written its part, and removes older checkpoints. All ranks must call it.

    `state.json` is written last, so a folder with it is complete.
    """

    def finish() -> None:
        write_json(target / STATE, state)
        for old in complete(target.parent)[:-KEPT]:
            _remove(old)

    collectives.barrier()
    collectives.rank_zero_only(finish, f"committing {target} and removing older checkpoints")


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path.parent for path in folder.glob(f"*/{STATE}")), key=number)


def number(checkpoint: Path) -> int:
    """The iteration or step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint that the first rank sees; partial ones are removed. All ranks must call it.

    UserError (5) on every rank if one of them does not see it.
    """

    def choose() -> Path | None:
        found = complete(folder)
        for partial in {*folder.glob("iteration-*"), *folder.glob("checkpoint-*")} - {*found}:
            shutil.rmtree(partial)
        return found[-1] if found else None

    chosen = collectives.rank_zero_only(choose, f"removing partial checkpoints from {folder}")
    missing = [
        rank for rank, there in enumerate(collectives.gather_objects(not chosen or _is_committed(chosen))) if not there
    ]
    if missing:
        raise UserError(
            f"{chosen} is not there for rank {missing[0]}: runs_dir must be a folder that all nodes share", 5
        )
    return chosen


def restore(folder: Path, parts: Mapping[str, Part]) -> dict[str, Any] | None:
    """Loads the newest complete checkpoint of `save` into `parts` and returns its state; None if there is none."""
    found = newest(folder)
    if found is None:
        return None
    for name, part in parts.items():
        part.load(found / name)
    return collectives.broadcast_result(lambda: _state(found))


def best_folder(folder: Path, iteration: int) -> Path:
    """Where the policy of an iteration is kept if it was the best so far. Each iteration has its own folder, because a
    resume may go back to an older one."""
    return folder / f"best-{iteration:06d}"


def forget_bests(folder: Path, current: int) -> None:
    """Removes kept policies that no complete checkpoint names, except that of iteration `current`."""
    named = {current, *(_state(path)["best_iteration"] for path in complete(folder))}
    for path in {*folder.glob("best-*")} - {best_folder(folder, iteration) for iteration in named}:
        shutil.rmtree(path)


def _is_committed(checkpoint: Path) -> bool:
    return (checkpoint / STATE).is_file()


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())


def _remove(checkpoint: Path) -> None:
    """Removes `state.json` first, so that an interrupted removal leaves a partial checkpoint."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
