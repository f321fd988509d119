"""What benchmarks change in their process, and tests must not keep."""

import pytest
import torch


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def where_figures_go(tmp_path, monkeypatch):
    """Every benchmark writes a file, where it is called."""
    monkeypatch.chdir(tmp_path)
