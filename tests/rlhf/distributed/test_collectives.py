"""Shares, and what two ranks with unequal rows make of them."""

import multiprocessing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.distributed import collectives


@dataclass(frozen=True)
class Rows:
    number_BR: Tensor
    flag_B: Tensor


def rows_of(rank):
    """Rank 0 has three rows, rank 1 one."""
    first, count = (0, 3) if rank == 0 else (3, 1)
    number = torch.arange(first, first + count, dtype=torch.float32)
    return Rows(torch.stack([number, -number], 1), number % 2 == 0)


# --- alone ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 9))
def test_shares_cover_all_rows_in_order_and_differ_by_one_at_most(total, world):
    shares = [list(range(total))[collectives.shard(total, rank, world)] for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(total))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 60), st.integers(1, 9))
def test_even_shares_are_equally_many_and_joined_again_in_row_order(total, world):
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "world_size", lambda: world)
        for rank in range(world):
            patch.setattr(collectives, "rank", lambda rank=rank: rank)
            parts.append(collectives.even_shard(total))
        patch.setattr(collectives, "gather_objects", lambda mine: [[10 * row for row in part] for part in parts])
        joined = collectives.join_shards([], total)
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == -(-total // world)
    assert joined == [10 * row for row in range(total)]


def test_one_process_needs_no_group():
    rows = rows_of(0)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.gather_rows(rows) is rows
    assert collectives.gather_objects("x") == ["x"]
    assert collectives.join_shards([4, 5], 2) == [4, 5]
    collectives.barrier()


def test_a_barrier_names_its_device_to_nccl(monkeypatch):
    said = []
    monkeypatch.setattr(collectives, "initialised", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "barrier", lambda **arguments: said.append(arguments))
    collectives.barrier()
    assert said == [{"device_ids": [3]}]


def test_all_groups_have_the_time_limit_of_the_first(tmp_path):
    limit = timedelta(seconds=77)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, timeout=limit)
    try:
        group = dist.new_group([0])
        options = cast(Any, group)._get_backend(torch.device("cpu")).options
        assert options._timeout != limit
        collectives.share_time_limit()
        assert options._timeout == limit
    finally:
        dist.destroy_process_group()


# --- two ranks ------------------------------------------------------------------------------------------------------


def on_a_rank(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gathered = collectives.gather_rows(rows_of(rank))
    empty = collectives.gather_rows(Rows(torch.ones(2 * rank, 2), torch.ones(2 * rank).bool()))
    answered = collectives.join_shards([row * row for row in collectives.even_shard(5)], 5)
    collectives.barrier()
    results.put(
        (collectives.rank(), gathered.number_BR.tolist(), gathered.flag_B.tolist(), len(empty.flag_B), answered)
    )
    dist.destroy_process_group()


@pytest.mark.integration
def test_ranks_with_unequal_rows_all_get_all_of_them_in_global_order(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=on_a_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    reports = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    numbers, flags = [[0, 0], [1, -1], [2, -2], [3, -3]], [True, False, True, False]
    assert reports == [(rank, numbers, flags, 2, [0, 1, 4, 9, 16]) for rank in range(2)]
