"""PPO learns, and only where it should: gold rises, and nothing moves without a learning rate or under a huge β.

In short on the small world, whose figures are exact. In long on the quickstart: one process and one reward model
trained on the pairs of both kinds; SFT and that reward model are trained once for all long tests.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.closed_form import LENGTH, settings
from benchmarks.small_world import World, new_critic, train
from launch import pipeline
from launch.settings import load
from rlhf.config import OptimConfig, RunConfig
from rlhf.tracking import read_metrics

SHIPPED = Path(__file__).parents[2] / "reward_data" / "shipped"

# --- in short: the small world ----------------------------------------------------------------------------------------

BETA = 0.5
SHORT = settings(BETA, iterations=20)
STILL = OptimConfig(lr=0.0)
HELD = 0.01
"""Nats. With β = 1000 the optimum is nearer than 1e-6; the rest is the last steps of a learning rate that ends at 0."""


@pytest.fixture(scope="module")
def world() -> World:
    return World(LENGTH)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_few_iterations_bring_most_of_the_reward_and_a_huge_beta_forbids_it(world):
    best = world.metrics(world.best(BETA))
    free = train(world, SHORT).path[-1]
    held = train(world, SHORT.model_copy(update={"kl_coef": 1000.0})).path[-1]
    assert free.reward > 0.5 * best.reward and free.kl > 10 * HELD
    assert held.kl < HELD


def test_without_a_learning_rate_nothing_moves(world):
    still = SHORT.model_copy(update={"optim": STILL, "critic_optim": STILL, "iterations": 3, "epochs": 2})
    trained = train(world, still)
    assert same_weights(trained.policy, world.reference)
    assert trained.critic is not None and same_weights(trained.critic, new_critic())
    assert trained.path == [trained.path[0]] * 4


# --- in long: the quickstart ------------------------------------------------------------------------------------------

ALONE = ("--hardware.workers", "1", "--tracking.uri", "null")
ONE_REWARD_MODEL = ("--reward.models", "{helpfulness: {own_tag: helpful, other_fraction: 0.33}}")
BOTH_ROLES = ("--ppo.safety_model", "helpfulness")

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """run(*overrides, given={stage: folder}) → a quickstart of its own, with the finished stages of others copied in."""

    def make(*overrides: str, given: dict[str, Path]) -> RunConfig:
        folder = tmp_path_factory.mktemp("runs")
        config = load("quickstart", ["--runs_dir", str(folder), *ALONE, *ONE_REWARD_MODEL, *BOTH_ROLES, *overrides])
        for stage, made in given.items():
            shutil.copytree(made, config.folder / stage)
        for stage in ("sft", "reward", "ppo"):
            if stage not in given:
                pipeline.run_stage(config, stage, local=True, name=None)
        return config

    return make


@pytest.fixture(scope="module")
def whole(run: Make) -> RunConfig:
    return run(given={})


@pytest.fixture(scope="module")
def sft(whole: RunConfig) -> dict[str, Path]:
    return {"sft": whole.folder / "sft", "base": whole.folder / "base"}


def gold_gain(config: RunConfig) -> dict[str, float]:
    """By how much gold rose from SFT to PPO, prompt by prompt, on the prompts that chose nothing."""
    return json.loads((config.folder / "ppo" / "artifact" / "manifest.json").read_text())["metrics"]["gain"]["gold"]


@pytest.mark.proof
@pytest.mark.timeout(4 * 3600)
def test_gold_rises_beyond_its_interval(whole):
    assert gold_gain(whole)["low"] > 0


@pytest.mark.proof
@pytest.mark.timeout(4 * 3600)
def test_half_of_the_labels_decided_by_a_coin_do_not_bring_gold_below_sft(run, sft, tmp_path):
    """A quarter of the pairs are turned round, and none says anything of safety."""
    coin = random.Random(0)
    rows = [json.loads(line) for line in (SHIPPED / "preferences.train.jsonl").read_text().splitlines()]
    noisy = tmp_path / "noisy.jsonl"
    noisy.write_text("".join(json.dumps(flipped(row) if coin.random() < 0.25 else unknown(row)) + "\n" for row in rows))
    config = run("--data.preferences.train", f"[{{path: {noisy}}}]", given=sft)
    assert gold_gain(config)["high"] > 0


def unknown(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chosen_safety": "unknown", "rejected_safety": "unknown"}


def flipped(row: dict[str, Any]) -> dict[str, Any]:
    return unknown(row) | {"chosen": row["rejected"], "rejected": row["chosen"]}


@pytest.mark.proof
@pytest.mark.timeout(4 * 3600)
def test_a_huge_beta_holds_a_trained_model_at_sft(run, whole, sft):
    free = dict(read_metrics(whole.folder / "ppo")["eval/kl"])
    held = run("--ppo.kl_coef", "1000", "--ppo.iterations", "8", given=sft | {"reward": whole.folder / "reward"})
    assert abs(dict(read_metrics(held.folder / "ppo")["eval/kl"])[8]) < 0.1 * free[8]
