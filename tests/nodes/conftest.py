"""Clusters of pseudo-nodes. `make nodes` runs these tests; they need Linux and root."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launch.testbed import Testbed


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Testbed]:
    """Nodes with one CPU each, as many as `NODES` of the file says."""
    with Testbed(tmp_path_factory.mktemp("testbed")).up(request.module.NODES) as testbed:
        yield testbed
