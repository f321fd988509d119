"""Whether two runs have the same results, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

TIMES = ("perf/", "system/")  # what a metric measures that is no result


def differences(one: Path, other: Path, stages: Sequence[str]) -> list[str]:
    """What differs between the artifacts and metrics of two runs: files, and names of metrics with their first step."""
    found = []
    for stage in stages:
        ours, theirs = _files(one / stage / "artifact"), _files(other / stage / "artifact")
        found += [f"{stage}/artifact/{name}" for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
        found += [f"{stage}: {text}" for text in _metric_differences(one / stage, other / stage)]
    return found


def _files(artifact: Path) -> dict[str, bytes]:
    files = (path for path in artifact.rglob("*") if path.is_file())
    return {path.relative_to(artifact).as_posix(): _content(path) for path in files}


def _content(path: Path) -> bytes:
    """Without the revision of the code, which may be committed between the runs."""
    if path.name != "manifest.json":
        return path.read_bytes()
    return json.dumps(json.loads(path.read_text()) | {"code_revision": None}).encode()


def _metric_differences(one: Path, other: Path) -> list[str]:
    ours, theirs = _metrics(one), _metrics(other)
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        mine, yours = ours.get(name, {}), theirs.get(name, {})
        wrong = sorted(step for step in mine.keys() | yours.keys() if mine.get(step) != yours.get(step))
        if wrong:
            found.append(f"{name} from step {wrong[0]}, {len(wrong)} of {len(mine | yours)} steps")
    return found


def _metrics(stage: Path) -> dict[str, dict[int, str]]:
    """name → step → the text of the value that was written last; NaN is equal to itself."""
    found: dict[str, dict[int, str]] = {}
    for line in (stage / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for name, value in values.items():
            if name not in ("step", "time") and not name.startswith(TIMES) and value is not None:
                found.setdefault(name, {})[values["step"]] = repr(value)
    return found
