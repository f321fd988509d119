"""Everything that a PPO stage needs to go on, and nothing else. A torn checkpoint is never taken for a whole one.

Random numbers need no place here: every draw is keyed by seed, iteration, prompt and position.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf import ranks
from rlhf.artifacts import write_json
from rlhf.engine import Engine

KEPT = 2


def save(folder: Path, iteration: int, engines: dict[str, Engine], state: dict[str, Any]) -> None:
    """Writes `folder/iteration-N`; `state.json` goes last, so its existence means whole. All ranks must call it."""
    target = folder / f"iteration-{iteration:06d}"
    if ranks.rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    ranks.barrier()
    for name, engine in engines.items():
        engine.save(target / name)
    ranks.barrier()
    if ranks.rank() == 0:
        write_json(target / "state.json", state | {"iteration": iteration, "world_size": ranks.world_size()})
        for old in whole(folder)[:-KEPT]:
            shutil.rmtree(old)
    ranks.barrier()


def whole(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("iteration-*/state.json"))


def restore(folder: Path, engines: dict[str, Engine]) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint into `engines` and returns its state; None when there is none."""
    found = whole(folder)
    if not found:
        return None
    for name, engine in engines.items():
        engine.load(found[-1] / name)
    return json.loads((found[-1] / "state.json").read_text())
