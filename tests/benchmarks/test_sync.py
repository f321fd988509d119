"""The weight sync on a random model: bytes by its shape, and what is made of the times."""

import pytest

from benchmarks import sync

H, F, LAYERS, KV, VOCAB = 64, 128, 2, 32, 768
PARAMETERS = 2 * VOCAB * H + LAYERS * (2 * H * H + 2 * H * KV + 3 * H * F + 2 * H) + H
QUICK = ["--quick", "--threads", "1", "--repeats", "2", "--rows", "2", "--length", "4"]


def check(result, shards):
    assert result["bytes"] == 4 * PARAMETERS
    assert 0 < result["share"] < 1
    assert [len(turns) for turns in result["found"]["turns"].values()] == [2, 2]
    assert shards == (result["workers"] > 1)


def test_a_sync_moves_every_parameter_once(capsys):
    (result,) = sync.main([*QUICK, "--workers", "1"])
    check(result, shards=False)
    assert sync.shown([result]) in capsys.readouterr().out


@pytest.mark.proof
def test_so_do_two_workers_with_shards():
    (result,) = sync.main([*QUICK, "--workers", "2"])
    check(result, shards=True)


def test_figures_are_medians_of_turns():
    turns = {"ours": [(9.0, 8), (1.0, 8), (2.0, 8)], "naive": [(3.0, 8), (6.0, 8), (7.0, 8)]}
    made = sync.summary(2, {"turns": turns, "iterations": [(1.0, 10.0), (1.0, 50.0), (4.0, 20.0)]})
    assert (made["bytes"], made["times_faster"], made["iteration"], made["share"]) == (8, 3.0, 20.0, 0.1)
