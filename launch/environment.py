"""What workers on other machines need of the driver's environment: settings of the hub, of the
communication and of the MLflow server."""

from __future__ import annotations

import os
import re

from rlhf.config import names_secret, without_secrets

CARRIED = re.compile(r"(HF|NCCL|GLOO|TORCH_NCCL|MLFLOW_TRACKING)_\w+")
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in a job of Ray, whose workers have the job's own variables


def carried(secret: bool) -> dict[str, str]:
    """The variables that hold secrets, or the others. Ray shows and logs the variables of a `runtime_env`, so secrets take
    another way to the workers.
    """
    names = () if SUBMITTED in os.environ else (name for name in os.environ if CARRIED.fullmatch(name))
    return {name: os.environ[name] for name in names if _holds_secret(name, os.environ[name]) == secret}


def _holds_secret(name: str, value: str) -> bool:
    return names_secret(name) or without_secrets(value) != value
