from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.serve.servers import Running, running
from tests.rlhf.serving.models import make_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder) as found:
        yield found
