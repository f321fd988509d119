"""Checkpoints, which are committed by their last file. Partial ones are removed, and the last two complete ones kept.

That file holds the digest of every other one, so a damaged checkpoint is set aside and the one before it is used. They hold no random state: every draw is keyed by seed, iteration, prompt and position.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.runs import claim
from rlhf.runs.artifacts import damage, digest_of, digests_of, plain, sync_folders, write_json

KEPT = 2
STATE = "state.json"
DAMAGED = "damaged-"


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

    `state.json` is written last, when all other files are on the disk, so a folder with it is complete. Each rank waits
    for the disk and hashes a shard of the files.
    """
    collectives.barrier()
    paths = collectives.broadcast_result(lambda: sorted(path for path in target.rglob("*") if path.is_file()))
    shards = collectives.gather_objects(digests_of(target, _shard(paths), to_disk=True))
    files = {name: entry for shard in shards for name, entry in shard.items()}

    def finish() -> None:
        claim.require()
        sync_folders(target)
        write_json(target / STATE, _sealed(state | {"files": files}))
        sync_folders(target.parent)
        for old in complete(target.parent)[:-KEPT]:
            _remove(old)

    collectives.rank_zero_only(finish, f"committing {target} and removing older checkpoints")


def of_step(folder: Path, step: int) -> Path:
    """Where a Trainer writes the checkpoint after `step`."""
    return folder / f"checkpoint-{step}"


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path.parent for path in folder.glob(f"*/{STATE}"))
    return sorted((path for path in found if not path.name.startswith(DAMAGED)), key=number)


def number(checkpoint: Path) -> int:
    """The iteration or step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint that the first rank sees and that is undamaged. All ranks must call it.

    Partial ones are removed; damaged ones are renamed to `damaged-…`, with a warning. UserError (5) on every rank if one
    of them does not see the checkpoint, UserError (4) if all are damaged or a file of the newest is another user's.
    """

    def choose() -> list[Path]:
        found = complete(folder)
        for partial in {*folder.glob("iteration-*"), *folder.glob("checkpoint-*")} - {*found}:
            shutil.rmtree(partial)
        return found[::-1]

    candidates = collectives.rank_zero_only(choose, f"removing partial checkpoints from {folder}")
    for candidate in candidates:
        _require_on_all_ranks(candidate)
        collectives.broadcast_result(functools.partial(_refuse_foreign_files, candidate))
        faults = [fault for fault in collectives.gather_objects(_damage(candidate)) if fault]
        if not faults:
            return candidate
        collectives.rank_zero_only(functools.partial(_set_aside, candidate, faults[0]), f"setting {candidate} aside")
    if candidates:
        raise UserError(
            f"every checkpoint in {folder} is damaged; they are renamed to {DAMAGED}…. "
            "The same command again starts the stage from its beginning.",
            4,
        )
    return None


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


def _require_on_all_ranks(checkpoint: Path) -> None:
    seen = collectives.gather_objects(_is_committed(checkpoint))
    if not all(seen):
        raise UserError(
            f"{checkpoint} is not there for rank {seen.index(False)}: runs_dir must be a folder that all nodes share", 5
        )


def _refuse_foreign_files(checkpoint: Path) -> None:
    """UserError (4) unless all files belong to this user or to root."""
    trusted = {0, os.geteuid()}
    foreign = {path: owner for path in [checkpoint, *checkpoint.rglob("*")] if (owner := _owner(path)) not in trusted}
    if not foreign.keys() or {*foreign.values()} == {_own_number_in(checkpoint)}:
        return
    path, owner = next(iter(foreign.items()))
    raise UserError(
        f"{path} belongs to another user ({owner}), so the checkpoint is not loaded. If you trust it, make it yours: "
        f"chown -R {os.geteuid()} {checkpoint}",
        4,
    )


def _owner(path: Path) -> int:
    return path.lstat().st_uid


def _own_number_in(folder: Path) -> int | None:
    """The owner of what this process writes there: network storage may give users other numbers."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as stream:
            return _owner(Path(stream.name))
    except OSError:
        return None


def _shard(paths: Sequence[Any]) -> Sequence[Any]:
    """This rank's part of the files to hash."""
    return paths[collectives.rank() :: collectives.world_size()]


def _sealed(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"digest": digest_of(plain(state))}


def _damage(checkpoint: Path) -> str:
    """What is wrong with this rank's shard of the files, "" if nothing."""
    try:
        state = _state(checkpoint)
        intact = state.pop("digest") == digest_of(state)
        files = state["files"]
    except (ValueError, KeyError, AttributeError):
        intact, files = False, {}
    if not intact:
        return f"{STATE} has other content than when it was written"
    return damage(checkpoint, {name: files[name] for name in _shard(sorted(files))}, verify=True)


def _set_aside(checkpoint: Path, fault: str) -> None:
    target = checkpoint.with_name(DAMAGED + checkpoint.name)
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)
    print(f"warning: a checkpoint is damaged: {fault}. It is now {target}; the one before it is used.", file=sys.stderr)


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())


def _remove(checkpoint: Path) -> None:
    """Removes `state.json` first, so that an interrupted removal leaves a partial checkpoint."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
