"""The common part of both sides of `benchmarks.ppo_vs_trl`: their job and their result. Imports nothing of ours."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NEVER = 1 << 30  # an EOS that no token is


@dataclass(frozen=True)
class Job:
    """Some iterations of PPO by one side, in a process of its own per rank. The first is for warming up."""

    model: str  # folder of policy and reference
    reward: str  # folder of reward model and critic
    config: dict[str, Any]  # our RunConfig
    prompts: list[list[int]]  # tokens, one iteration more than needed
    answers: list[list[int]]  # dictated, one to each prompt, its EOS inside; empty: each side samples its own
    pad: int
    eos: int | None  # None: no response ends before it is as long as it may be
    processes: int
    threads: int
    iterations: int
    device: str  # cpu, or cuda: the first device
    stock_trl: bool = False  # in bf16: TRL's sampling and scoring stay float32, as its own setting leaves them

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> Job:
        return cls(**json.loads(Path(path).read_text()))


def peak_memory() -> int:
    """Bytes: the largest resident size of this process so far (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
