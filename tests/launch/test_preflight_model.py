"""A hub model before a run, and the disk that a run needs."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from launch.preflight import LEAST_DISK, bytes_wanted, preflight_errors
from tests.hub import Hub
from tests.launch.test_preflight import empty_folder, obstacle, settings  # noqa: F401


@pytest.fixture
def of_hub(hub: Hub, tmp_path: Path) -> Hub:
    """The hub has `owner/name`: Llama's layers with 1,064 parameters, counted by hand, and 64 positions."""
    folder = tmp_path / "on the hub"
    folder.mkdir()
    shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "max_position_embeddings": 64, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | shape | more))
    (folder / "model.safetensors").write_bytes(b"\0" * 5_000_000)
    hub.add("owner/name", folder)
    return hub


FITTING = ["--sft.max_length", "64", "--reward.max_length", "64", "--ppo.max_prompt_length", "32"]
FITTING += ["--ppo.sampling.max_new_tokens", "32"]


def test_a_hub_model_is_checked_like_one_on_this_disk(of_hub: Hub) -> None:
    config = settings("--model.path", "owner/name", *FITTING, "--ppo.max_prompt_length", "33")
    error = obstacle(config)
    assert error.exit_code == 2 and "the model has 64 positions" in error.message
    assert preflight_errors(settings("--model.path", "owner/name", *FITTING)) == []
    assert of_hub.downloads("model.safetensors") == 0


def test_a_hub_that_is_away_is_an_obstacle_of_its_own(of_hub: Hub) -> None:
    of_hub.refuses = (503, "")
    error = obstacle(settings("--model.path", "owner/name", *FITTING))
    assert error.exit_code == 8 and "model.path: the hub cannot be reached" in error.message


def test_a_hub_model_is_looked_for_in_the_cache_when_offline(of_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    config = settings("--model.path", "owner/name", *FITTING)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert obstacle(config).exit_code == 4
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert preflight_errors(config) == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert preflight_errors(config) == []


def test_a_download_counts_on_the_disk_of_the_cache(of_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    config, usage = settings("--model.path", "owner/name", *FITTING), namedtuple("usage", "total used free")
    least = bytes_wanted(config)
    for free, fits in ((least + 6_000_000, True), (least + 4_000_000, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(10**12, 0, free))
        assert (preflight_errors(config) == []) == fits
    assert "for the base model in" in obstacle(config).message


@pytest.mark.parametrize("files", [("model.safetensors",), ("pytorch_model.bin",), ("model.safetensors", "model.bin")])
def test_disk_space_grows_with_the_model(tmp_path: Path, files: tuple[str, ...]) -> None:
    """A family whose layers are not Llama's is counted by its weights, once."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "dtype": "bfloat16"}))
    for name in files:
        (folder / name).write_bytes(b"\0" * 2_000_000)  # a million parameters
    config = settings("--model.path", "model", "--ppo.iterations", "60", "--ppo.checkpoint_every", "20")
    sft_two_rewards_policy_critic = 5 * 4 * 10**6
    three_checkpoints = 3 * 2 * 12 * 10**6
    best_and_a_better_one = 2 * 2 * 4 * 10**6
    peak = sft_two_rewards_policy_critic + three_checkpoints + best_and_a_better_one
    assert bytes_wanted(config) - LEAST_DISK == peak


def test_three_checkpoints_of_13b_are_counted() -> None:
    """312 GB each: 13.0 billion parameters of policy and of critic, with two moments, in float32."""
    run = ["--model.path", "meta-llama/Llama-2-13b-hf", "--ppo.checkpoint_every"]
    few, most = (bytes_wanted(settings(*run, every, "--ppo.iterations", "9")) for every in ("9", "3"))
    assert (most - few) / 1e9 == pytest.approx(2 * 312, abs=1)


def test_adapters_have_small_checkpoints() -> None:
    run = ["--model.path", "meta-llama/Llama-2-13b-hf", "--pipeline", "[sft]", "--sft.checkpoints", "3"]
    artifact = 13.016 * 4
    assert bytes_wanted(settings(*run)) / 1e9 == pytest.approx(0.5 + artifact + 3 * 13.016 * 12, abs=1)
    adapters = bytes_wanted(settings(*run, "--model.lora", "{rank: 16}"))
    assert adapters / 1e9 == pytest.approx(0.5 + artifact + 3 * 0.0626 * 12, abs=0.1)
