"""What the tests of PPO's stage read of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf.ppo import models
from rlhf.tracking import read_metrics

ALL_BUT_PPO = "reward/safety"
ROLE: dict[str, Any] = {"train": []}


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def series(config):
    """All figures of the stage that do not measure time."""
    return {name: points for name, points in read_metrics(config.folder / "ppo").items() if "perf/" not in name}


def opened(config) -> Any:
    """The models of PPO, as the stage opens them."""
    context: Any = SimpleNamespace(
        inputs={"sft": SimpleNamespace(path=config.folder / "sft/artifact")},
        device=torch.device("cpu"),
        local=True,
        open_pool=None,
    )
    folders = {name: config.folder / "reward" / name / "artifact" for name in ("helpfulness", "safety")}
    return models.open_models(config, context, folders)
