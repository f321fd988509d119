"""Whether files written on one node are there on the others, at once, also when they are replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.doctor.result import CheckResult, ok

PATIENCE_S = 5.0
LATE_S = 1.5


def write(folder: Path, name: str, text: str) -> None:
    """As checkpoints are written: under another name, to the disk, renamed."""
    own = folder / f"{name}.part"
    with own.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    own.rename(folder / name)


def read(folder: Path, names: Sequence[str], text: str) -> dict[str, float | None]:
    """File → seconds until it was listed and had `text`; None where that took too long."""
    began, found = time.monotonic(), dict.fromkeys(names)
    while missing := [name for name in names if found[name] is None]:
        listed = set(os.listdir(folder)) if folder.is_dir() else set()
        for name in missing:
            try:
                if name in listed and (folder / name).read_text() == text:
                    found[name] = time.monotonic() - began
            except OSError:  # a stale handle
                continue
        if time.monotonic() - began > PATIENCE_S:
            break
        time.sleep(0.05)
    return found


def judge(rounds: Sequence[Mapping[str, Mapping[str, float | None]]], folder: Path) -> Iterator[CheckResult]:
    """`rounds`: reader → writer → seconds, for new files and for replaced ones."""
    good = True
    for reader in rounds[0]:
        unseen = {kind: [w for w, s in seen[reader].items() if s is None] for kind, seen in zip(("new", "replaced"), rounds, strict=True)}  # fmt: skip
        slowest = max((s or 0.0 for seen in rounds for s in seen[reader].values()), default=0.0)
        if unseen["new"]:
            good = False
            text = f"it does not see in {folder} what {', '.join(unseen['new'])} wrote there"
            yield CheckResult("shared storage", reader, "failed", text, "mount the same storage there on all nodes")
        elif unseen["replaced"] or slowest > LATE_S:
            good = False
            text = f"it sees files replaced by {', '.join(unseen['replaced']) or 'others'} only after {slowest or PATIENCE_S:.1f} s"
            remedy = "mount it with a short attribute cache (NFS: actimeo=1, lookupcache=none)"
            yield CheckResult("shared storage", reader, "warning", text, remedy)
    if good:
        yield ok("shared storage", f"{folder} is the same on all nodes, also after a rename")
