"""The peak memory of `rlhf evaluate reward` by the number of pairs: the whole command, with its report.

    python -m benchmarks.evaluate_memory --sizes 1000 100000 --out evaluate_memory.json

Every size is a process of its own, on pairs whose prompts all differ, so that the intervals have as many clusters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluate_reward import reward_model, shipped_pairs
from benchmarks.turns import parser_of, report, table
from rlhf.errors import UserError


def distinct_pairs(count: int) -> Iterator[str]:
    """Lines of shipped pairs, each with a number in its prompt."""
    for number, line in enumerate(shipped_pairs(count)):
        row = json.loads(line)
        row["prompt"][-1]["content"] += f" ({number})"
        yield json.dumps(row) + "\n"


def evaluate(model: Path, pairs: int, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Peak resident memory in MiB and seconds of the command on so many pairs."""
    file = folder / f"{pairs}.jsonl"
    with file.open("w") as stream:
        stream.writelines(distinct_pairs(pairs))
    command = [sys.executable, "-m", "launch.cli", "evaluate", "reward", str(model), str(file)]
    command += ["--out", str(folder / str(pairs)), "--tracking-uri", "null"]
    command += ["--batch-size", str(args.batch_size), "--precision", args.precision]
    start = time.perf_counter()
    with (folder / f"{pairs}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the evaluation of {pairs} pairs failed:\n{(folder / f'{pairs}.log').read_text()[-2000:]}", 5)
    return {"pairs": pairs, "mib": usage.ru_maxrss / 1024, "seconds": time.perf_counter() - start}


def shown(results: Sequence[dict[str, Any]]) -> str:
    first = results[0]["mib"]
    rows = [
        [f"{r['pairs']:,}", f"{r['mib']:.0f} MiB", f"{r['mib'] / first:.2f}", f"{r['seconds']:.0f} s"] for r in results
    ]
    return table(["pairs", "peak memory", f"of that of {results[0]['pairs']:,}", "whole command"], rows)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = parser_of("evaluate_memory", __doc__, repeats=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 100_000], help="(default 1000 100000)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts at once (default 64)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = reward_model(args, Path(folder))
        results = [evaluate(model, pairs, args, Path(folder)) for pairs in args.sizes]
    report(args, results, shown(results))
    return results


if __name__ == "__main__":
    main()
