"""Writes tests/golden/trl_ppo.*, the numbers of TRL's own PPO: `python -m benchmarks.trl_reference`.

tests/proofs/test_trl_reference.py gives the same weights and tokens to our PPO and compares.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.trl_environment import CACHE, trl_python
from rlhf.errors import UserError

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_reference", description=__doc__)
    parser.add_argument("--out", type=Path, default=GOLDEN, help="folder for trl_ppo.json and trl_ppo.safetensors")
    parser.add_argument("--venv", type=Path, default=CACHE, help="environment with TRL 1.12, made if missing")
    arguments = parser.parse_args()
    try:
        python = trl_python(arguments.venv)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    arguments.out.mkdir(parents=True, exist_ok=True)
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [
        str(python),
        "-W",
        "ignore",
        str(Path(__file__).with_name("trl_record.py")),
        str(arguments.out / "trl_ppo"),
    ]
    return subprocess.run(command, env=os.environ | quiet | {"OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
