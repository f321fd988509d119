"""`rlhf doctor RUNFILE`."""

from __future__ import annotations

import time
from collections.abc import Iterator

from launch.doctor.result import CheckResult, ok
from rlhf.config import RunConfig
from rlhf.errors import UserError

FINE = {
    "data": "every file is there",
    "model": "it is there, or the hub has it for you, and it fits the settings",
    "sampling engine": "it is installed and fits the model",
    "disk": "runs_dir has the room that the run takes",
    "memory": "the plan of the run fits, as far as sizes are known",
    "precision": "this CPU has it",
    "processors": "this machine has as many as the workers take",
}
"""What a check of `rlhf run` says where it finds nothing."""


def doctor(config: RunConfig) -> int:
    """Prints what was found. The exit code: 0, or that of the first check that failed."""
    from launch.doctor.table import summary, table
    from launch.pipeline import absolute
    from launch.terminal import console

    began = time.monotonic()
    results = list(diagnose(absolute(config)))
    console.print(table(results))
    console.print(summary(results, time.monotonic() - began))
    return next((one.exit_code for one in results if one.verdict == "failed"), 0)


def diagnose(config: RunConfig) -> Iterator[CheckResult]:
    from launch.connection import connection
    from launch.doctor.examine import examine_nodes

    yield from here(config)
    yield from data(config)
    try:
        with connection(config.hardware.ray_address, config.folder / "ray"):
            yield from examine_nodes(config, thorough=True)
    except UserError as error:
        yield CheckResult("cluster", "", "failed", error.message, "", error.exit_code)
    except ConnectionError as error:
        text = f"there is no cluster at {config.hardware.ray_address}: {' '.join(str(error).split())[:200]}"
        yield CheckResult("cluster", "", "failed", text, "start Ray there, or mend hardware.ray_address")


def here(config: RunConfig) -> Iterator[CheckResult]:
    """What `rlhf run` checks before it starts anything."""
    from launch.preflight import preflight_errors_by_check

    for check, errors in preflight_errors_by_check(config, workers=True).items():
        for error in errors:
            yield CheckResult(check, "here", "failed", error.text, "", error.exit_code)
        if not errors:
            yield ok(check, FINE[check], "here")


def data(config: RunConfig) -> Iterator[CheckResult]:
    """Reads all rows, as the run will."""
    from launch.pipeline import checked_data
    from reward_data import DataError
    from stages.base import parts_of

    try:
        found = checked_data(config, parts_of(config))
    except DataError as error:
        yield CheckResult("data rows", "", "failed", error.message, "mend the file, or set bad_rows: skip", 3)
    except UserError as error:
        yield CheckResult("data rows", "", "failed", error.message, "", error.exit_code)
    else:
        counts = (f"{len(split.train)} {role}" for role, split in found.items())
        yield ok("data rows", f"to train on: {', '.join(counts)}")
