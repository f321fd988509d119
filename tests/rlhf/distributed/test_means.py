"""Means over ranks and micro-batches are means over all that was counted, never means of means."""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from rlhf.distributed.means import Mean, Means


def test_a_mean_is_the_total_over_the_count():
    means = Means()
    means.add("loss", 10.0, 1)
    means.add("loss", torch.tensor(2.0), torch.tensor(3))
    assert means.reduce() == {"loss": 3.0}  # the mean of means would be 5.33


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), min_size=1, max_size=6))
def test_no_split_changes_the_mean(parts):
    means = Means()
    for part in parts:
        means.add("x", sum(part), len(part))
    values = [value for part in parts for value in part]
    expected = {"x": pytest.approx(sum(values) / len(values), abs=1e-9)} if values else {}
    assert means.reduce() == expected


def test_a_mean_over_nothing_is_left_out_of_the_report():
    means = Means()
    means.add("nothing", 0.0, 0)
    assert means.reduce() == {}
    assert math.isnan(Mean(0.0, 0.0).value)


def test_the_graph_of_a_loss_is_not_kept():
    means = Means()
    means.add("loss", torch.ones(1, requires_grad=True).sum())
    (kept, _) = means._parts["loss"][0]
    assert isinstance(kept, torch.Tensor) and kept.grad_fn is None
    assert means.reduce() == {"loss": 1.0}


def on_a_rank(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    means = Means()
    if rank == 0:
        means.add("shared", 1.0, 1)
        means.add("only_here", 4.0, 2)
    else:
        means.add("shared", torch.tensor(11.0), torch.tensor(3.0))
    results.put((means.reduce(), Means().reduce()))
    dist.destroy_process_group()


@pytest.mark.integration
def test_ranks_with_skewed_counts_and_other_names_agree_on_one_report(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=on_a_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in ranks:
        process.start()
    reports = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(timeout=60)
    assert reports == [({"shared": 3.0, "only_here": 2.0}, {})] * 2
