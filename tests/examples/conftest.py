"""A model so small that the examples take seconds."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained base model of the small run."""
    from launch.settings import load
    from rlhf.models import make_tiny

    smoke = Path(__file__).parents[1] / "smoke.yaml"
    return make_tiny(load(smoke, ["--runs_dir", str(tmp_path_factory.mktemp("runs"))]))
