"""What workers on other machines need of the driver's environment: settings of the hub and of the communication."""

from __future__ import annotations

import os
import re

from rlhf.config import without_secrets

CARRIED = re.compile(r"(HF|NCCL|GLOO|TORCH_NCCL)_\w+")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in a job of Ray, whose workers have the job's own variables


def carried(secret: bool) -> dict[str, str]:
    """The variables that hold secrets, or the others. Ray shows and logs the variables of a `runtime_env`, so secrets take
    another way to the workers.
    """
    names = () if SUBMITTED in os.environ else (name for name in os.environ if CARRIED.fullmatch(name))
    return {name: os.environ[name] for name in names if _holds_secret(name, os.environ[name]) == secret}


def _holds_secret(name: str, value: str) -> bool:
    return SECRET.search(name) is not None or without_secrets(value) != value
