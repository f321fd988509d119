"""A cluster that lost nodes gets as many workers as have room, divide the batches and are not under the least."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import worker_group
from launch.elastic import can_grow, fits, sized
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs.provenance import settings_digest
from stages.base import stage_of

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
BATCHES = [
    "--sft.batch_size",
    "24",
    "--sft.micro_batch_size",
    "6",
    "--ppo.batch_size",
    "24",
    "--ppo.minibatch_size",
    "24",
]
BATCHES += ["--reward.batch_size", "24"]


def settings(*overrides: str) -> RunConfig:
    return load(SMOKE, ["--hardware.workers", "8", "--hardware.min_workers", "2", *BATCHES, *overrides])


def cpus(count: int) -> dict[str, float]:
    return {"CPU": float(count), "GPU": 0.0}


@pytest.mark.parametrize(
    ("have", "workers", "micro"),
    [(9, 8, 3), (8, 8, 3), (7, 6, 2), (5, 4, 3), (3, 3, 2), (2, 2, 3)],  # of 24 rows; a micro-batch never grows
)
def test_the_most_that_have_room_and_divide_the_batches(have: int, workers: int, micro: int) -> None:
    found = sized(settings(), "sft", cpus(have))
    assert (found.hardware.workers, found.sft.micro_batch_size) == (workers, micro)
    assert (found.sft.batch_size, found.ppo.minibatch_size) == (24, 24)


def test_fewer_than_the_least_are_refused() -> None:
    config = settings()
    assert sized(config, "sft", cpus(1)) is config and not fits(config, "sft", cpus(1))
    with pytest.raises(UserError, match="8 workers × 1 CPUs = 8, but the cluster has 1") as caught:
        worker_group._check_room(config, "sft", cpus(1))
    assert caught.value.exit_code == 5


def test_without_a_least_nothing_is_made_smaller() -> None:
    config = settings("--hardware.min_workers", "null")
    assert sized(config, "sft", cpus(7)) is config


def test_a_reward_model_has_its_own_number() -> None:
    found = sized(settings("--hardware.workers_per_reward_model", "4"), "reward/safety", cpus(3))
    assert stage_of("reward/safety").workers(found) == 3


def test_the_number_of_workers_makes_nothing_stale() -> None:
    config = settings()
    for stage in ("sft", "reward/safety", "ppo"):
        digests = {
            settings_digest(one, stage, stage_of(stage).roles) for one in (config, sized(config, stage, cpus(3)))
        }
        assert len(digests) == 1, stage
    assert sized(config, "sft", cpus(3)).sft.micro_batch_size != config.sft.micro_batch_size


def test_a_least_above_the_most_is_refused() -> None:
    with pytest.raises(UserError, match="hardware.min_workers: is 9, which is more than hardware.workers"):
        settings("--hardware.min_workers", "9")


@pytest.mark.parametrize(
    ("have", "free", "grows"),
    [
        (3, 0, False),
        (5, 0, False),  # others use what there is
        (3, 3, False),  # what is free is told late
        (4, 1, True),  # to 4 of 8
        (5, 2, True),
        (2, 9, False),
        (8, 5, True),
    ],
)
def test_a_group_of_3_grows_where_more_are_possible(have: int, free: int, grows: bool) -> None:
    config = settings()
    smaller = sized(config, "sft", cpus(3))
    assert can_grow(config, smaller, "sft", cpus(have), cpus(free)) == grows
