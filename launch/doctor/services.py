"""What is outside the cluster: the tracking server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from launch.doctor.result import CheckResult, ok
from rlhf.config import RunConfig
from rlhf.tracking import public_uri

Reached = Mapping[str, tuple[str, str] | None]
"""Node → what is wrong with the tracking store, and what to do."""


def tracking(config: RunConfig, reached: Reached) -> Iterator[CheckResult]:
    if (uri := config.tracking.uri) is None:
        yield ok("tracking", "files alone (tracking.uri: null)")
        return
    problems = {
        problem: [node for node in reached if reached[node] == problem] for problem in reached.values() if problem
    }
    for (text, remedy), where in problems.items():
        named = "all nodes" if len(where) == len(reached) > 1 else ", ".join(where)
        yield CheckResult("tracking", named, "failed", f"{public_uri(uri)}: {text}", remedy, 8)
    if any(reached.values()):
        return
    if uri.startswith("sqlite:") and len(reached) > 1:
        text = "SQLite on storage that several machines share may be damaged by its locks"
        yield CheckResult("tracking", "", "warning", text, "run `mlflow server` and set tracking.uri to its address")
    else:
        yield ok("tracking", f"{public_uri(uri)} answers")
