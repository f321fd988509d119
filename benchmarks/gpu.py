"""What only a GPU can show, in one command: the tests that need CUDA, and every benchmark at the shapes of 1B and 7B.

    make gpu                                   all parts
    python -m benchmarks.gpu tests update-7b   some of them

Each part is a command with a time limit. The record, benchmarks/records/DATE-GPU.json, is written anew after every part,
so that a machine that is taken away leaves what was done. `--quick` runs the same parts with tiny models on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.turns import table

ROOT = Path(__file__).parents[1]
LIMIT_S = 480.0  # of a part
TESTS = "tests/rlhf/test_cuda.py tests/rlhf/generation/test_cuda_graph.py"
TRAINED = "--precision bf16 --steps 4 --max-length 512 --rows 1500 --repeats 1"


@dataclass(frozen=True)
class Part:
    name: str
    module: str  # of benchmarks, or pytest
    arguments: str
    quick: str = "--quick"

    def command(self, quick: bool) -> list[str]:
        """As it is given behind `python`."""
        module = self.module if self.module == "pytest" else f"benchmarks.{self.module}"
        return ["-m", module, *(self.quick if quick else self.arguments).split()]


PARTS = (
    Part("tests", "pytest", TESTS, TESTS),
    Part("quickstart", "quickstart", ""),
    Part("update-1b", "update", "--shape 1B --precision bf16 --rows 128 --pass-tokens 8192 --repeats 3"),
    Part("update-7b", "update", "--shape 7B --precision bf16 --rows 32 --pass-tokens 4096 --repeats 2"),
    Part(
        "sampling-1b",
        "sampling",
        "--shape 1B --precision bf16 --rows 64 256 --lengths fixed --fixed-tokens 64 --repeats 3",
        "--quick --rows 4 --lengths fixed --fixed-tokens 4 --max-prompt-length 64 --repeats 1",
    ),
    Part(
        "sampling-7b",
        "sampling",
        "--shape 7B --precision bf16 --rows 64 --lengths fixed --fixed-tokens 64 --repeats 2",
        "--quick --rows 2 --lengths fixed --fixed-tokens 4 --max-prompt-length 64 --repeats 1",
    ),
    Part("sft-1b", "sft", f"--shape 1B --batch 32 --micro-batch 8 {TRAINED}", "--quick --repeats 1"),
    Part("reward-1b", "reward", f"--shape 1B --batch 128 --micro-batch 64 {TRAINED}", "--quick --repeats 1"),
    Part("sync-1b", "sync", "--shape 1B --precision bf16 --workers 1 --rows 64 --length 64", "--quick --repeats 1"),
    Part(
        "scaling-1b",
        "scaling",
        "--shape 1B --precision bf16 --workers 1 --rows 32 --length 64 --micro-batch 16 --repeats 2",
        "--quick --repeats 1",
    ),
    Part(
        "ppo-1b",
        "ppo_vs_trl",
        "--shape 1B --precision bf16 --lengths fixed --rows 64 --micro-batch 8 --pass-tokens 6144 --max-prompt-length 64 "
        "--response-length 128 --epochs 1 --rounds 1 --iterations 4",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not args.quick and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --quick runs tiny models on this CPU")
    chosen = [part for part in PARTS if not args.parts or part.name in args.parts]
    record = head()
    path = args.records / f"{record['date'][:10]}-{slug(record['device'])}.json"
    record["parts"] = earlier(path)
    args.records.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        print(f"\n== {part.name}", flush=True)
        record["parts"][part.name] = measured(part, args.quick, args.minutes * 60)
        path.write_text(json.dumps(record, indent=1) + "\n")
    ends = {part.name: record["parts"][part.name] for part in chosen}
    print("\n" + table(["part", "ended", "seconds"], [[n, e["ended"], f"{e['seconds']:.0f}"] for n, e in ends.items()]))
    print(f"\n{path} holds all figures")
    return 0 if all(end["ended"] == "well" for end in ends.values()) else 1


def measured(part: Part, quick: bool, limit_s: float) -> dict[str, Any]:
    """Its command, how it ended and after how many seconds, and what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = part.command(quick)
        writes = [] if part.module == "pytest" else ["--out", str(out)]
        start = time.perf_counter()
        ended = _run([sys.executable, *command, *writes], limit_s)
        seconds = time.perf_counter() - start
        results = json.loads(out.read_text())["results"] if out.is_file() else None
    return {"command": " ".join(["python", *command]), "ended": ended, "seconds": seconds, "results": results}


def _run(command: Sequence[str], limit_s: float) -> str:
    """How it ended. At the limit its whole process group is ended, ranks and all."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, process_group=0)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {limit_s:g} s"
    return "well" if code == 0 else f"exit code {code}"


def head() -> dict[str, Any]:
    """When, where and with what."""
    on_gpu = torch.cuda.is_available()
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "devices": torch.cuda.device_count() if on_gpu else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "revision": revision.stdout.strip(),
    }


def earlier(path: Path) -> dict[str, Any]:
    """Parts that were run on the same day on the same device."""
    return json.loads(path.read_text())["parts"] if path.is_file() else {}


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument(
        "parts", nargs="*", metavar="PART", choices=[*names, []], help=f"(default: all) {', '.join(names)}"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models on a CPU: does it work?")
    parser.add_argument("--minutes", type=float, default=LIMIT_S / 60, help="limit of a part (default %(default)g)")
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks/records", help="folder of the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
