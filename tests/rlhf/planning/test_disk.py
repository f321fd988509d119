"""The disk of a run against sums by hand: with 1,000 parameters an artifact has 4 kB and a checkpoint 12 kB."""

from __future__ import annotations

import pytest

from launch.settings import load
from rlhf.planning.disk import disk_bytes

NONE = ["--sft.checkpoints", "0", "--reward.checkpoints", "0", "--ppo.checkpoint_every", "99"]  # of 16 iterations
BEST = 2 * 2 * 4  # policy and critic, and better ones while they are written


def kilobytes(*settings: str) -> int:
    return disk_bytes(load("quickstart", [*NONE, *settings]), 1000) // 1000


def test_the_artifacts_of_all_stages_lie_side_by_side() -> None:
    """SFT, two reward models, policy and critic."""
    assert kilobytes() == 5 * 4 + BEST
    assert kilobytes("--pipeline", "[sft, reward]") == 3 * 4
    assert kilobytes("--ppo.advantage", "rloo", "--ppo.group_size", "4") == 4 * 4 + BEST // 2  # no critic


def test_the_peak_may_be_in_the_middle() -> None:
    assert kilobytes("--sft.checkpoints", "3") == 4 + 3 * 12 > 5 * 4 + BEST


@pytest.mark.parametrize(("written", "most"), [("1", 1), ("2", 2), ("3", 3), ("9", 3)])
def test_three_checkpoints_lie_there_at_most(written: str, most: int) -> None:
    assert kilobytes("--pipeline", "[sft]", "--sft.checkpoints", written) == 4 + most * 12


@pytest.mark.parametrize(("every", "most"), [("16", 1), ("6", 2), ("1", 3)])
def test_ppo_writes_those_of_policy_and_critic(every: str, most: int) -> None:
    assert kilobytes("--ppo.checkpoint_every", every) == 5 * 4 + BEST + most * 2 * 12


@pytest.mark.parametrize(("workers", "each", "beside"), [("2", "2", 1), ("2", "1", 2), ("8", "1", 2)])
def test_reward_models_that_are_trained_side_by_side_have_checkpoints_side_by_side(
    workers: str, each: str, beside: int
) -> None:
    hardware = ["--hardware.workers", workers, "--hardware.workers_per_reward_model", each]
    assert kilobytes("--pipeline", "[sft, reward]", "--reward.checkpoints", "2", *hardware) == 3 * 4 + beside * 2 * 12
