"""Random faults over a pipeline on three pseudo-nodes, whose end must be that of a run without faults: `make soak`.

    python -m tests.soak --faults 50 --seed 0

Needs Linux and root. Every fault waits for a new checkpoint in all stages that run. What is left at the end is compared with
an undisturbed run on the same nodes: artifacts of all stages and all metrics that are no times, bit by bit. SIGTERM ends the
faults and not the run. Exit status 0 if all faults struck, the run went on after each, and nothing differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
import threading
import time
from itertools import takewhile
from pathlib import Path

from launch.testbed import Testbed
from tests.soak.comparison import differences
from tests.soak.progress import STAGES
from tests.soak.run import Finished, Pipeline, Trouble
from tests.soak.schedule import Fault, schedule, settings
from tests.soak.strike import Row, strike
from tests.soak.table import page

NODES = 3
MOST_TROUBLES = 3  # in a row
LONGEST_S = 1800.0


def main() -> int:
    args = _parser().parse_args()
    testbed = Testbed(Path(tempfile.gettempdir(), "rlhf-soak"))
    command = f"python -m tests.soak --faults {args.faults} --seed {args.seed}"
    own = settings(args.faults)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with testbed.up(NODES):
        calm, disturbed = Pipeline(testbed, "calm", own), Pipeline(testbed, "disturbed", own)
        calm_s = _finish(calm)
        print(f"without faults: {calm_s:.0f} s", flush=True)
        began = time.monotonic()
        rows = _soak(disturbed, schedule(args.faults, args.seed), args.log, command)
        took = time.monotonic() - began
    found = differences(calm.folder, disturbed.folder, STAGES)
    result = [
        f"{len(rows)} of {args.faults} faults in {took / 60:.0f} min; without faults the run takes {calm_s / 60:.1f} min",
        "the end differs from the run without faults: " + "; ".join(found[:20])
        if found
        else "the end equals the run without faults bit by bit: artifacts of all stages, and all metrics but `perf/` and `system/`",
    ]
    troubles = [row for row in rows if row.trouble]
    args.log.write_text(page(command, rows, result))
    print("\n".join([*result, f"{len(troubles)} times it did not go on by itself; see {args.log}"]), flush=True)
    return int(bool(found or troubles or len(rows) < args.faults))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default 0)")
    parser.add_argument("--log", type=Path, default=Path("build/soak.md"), help="the record (default build/soak.md)")
    return parser


def _finish(pipeline: Pipeline) -> float:
    """Seconds that the pipeline takes."""
    began = time.monotonic()
    pipeline.start()
    if code := pipeline.ended(LONGEST_S):
        raise SystemExit(f"the run without faults ended with exit code {code}: {pipeline.log}")
    return time.monotonic() - began


def _soak(pipeline: Pipeline, faults: list[Fault], log: Path, command: str) -> list[Row]:
    """Strikes until no fault is left or the pipeline is complete, and lets it come to its end."""
    rows: list[Row] = []
    before: dict[str, int] = {}
    began = time.monotonic()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    pipeline.start()
    try:
        for fault in takewhile(lambda _: not stop.is_set(), faults):
            row = strike(fault, pipeline, before)
            rows.append(dataclasses.replace(row, at_s=time.monotonic() - began))
            log.write_text(page(command, rows, ["under way"]))
            print(f"{fault.number} {fault.kind}: {row.where}; {row.trouble or row.went_on_s}", flush=True)
            if row.trouble:
                if all(one.trouble for one in rows[-MOST_TROUBLES:]) and len(rows) >= MOST_TROUBLES:
                    raise SystemExit(f"{MOST_TROUBLES} troubles in a row: {pipeline.log}")
                pipeline.kill()
                pipeline.start()
        if code := pipeline.ended(LONGEST_S):
            raise Trouble(f"the run ended with exit code {code}: {pipeline.log}")
    except Finished:
        pass
    return rows


if __name__ == "__main__":
    sys.exit(main())
