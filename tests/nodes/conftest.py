"""Clusters of pseudo-nodes. `make nodes` runs these tests; they need Linux and root, and are skipped elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launch.testbed import Testbed
from launch.testbed.namespaces import check_machine
from rlhf.errors import UserError


@pytest.fixture(scope="session")
def machine() -> None:
    try:
        check_machine()
    except UserError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def cluster(
    machine: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Testbed]:
    """Nodes with one CPU each, as many as `NODES` of the file says."""
    with Testbed(tmp_path_factory.mktemp("testbed")).up(request.module.NODES) as testbed:
        yield testbed
