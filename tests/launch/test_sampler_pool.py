"""Two engines of vLLM as actors of a real Ray: they sample what one in this process would, also where one is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.connection import connection
from launch.sampler_pool import Checksum, PooledSampler, open_pool
from rlhf.config import HardwareConfig, SamplingConfig
from rlhf.data.batches import PromptBatch
from rlhf.errors import UserError
from rlhf.generation.vllm import Capacity
from rlhf.models.policy import PolicyModel
from tests.rlhf.generation.test_vllm import EOS, PAD, SAME, R, installed, make, passing

TEMPERATURE = 0.7
SETTINGS = SamplingConfig(engine="vllm", workers=2, temperature=TEMPERATURE, max_new_tokens=R)
HARDWARE = HardwareConfig(placement_timeout_s=240, collective_timeout_s=240)
COUNT = 24

pytestmark = pytest.mark.timeout(600)


def prompts() -> PromptBatch:
    tokens_BP = torch.randint(3, 12, (COUNT, 4), generator=torch.Generator().manual_seed(0))
    mask_BP = torch.ones_like(tokens_BP, dtype=torch.bool)
    mask_BP[::2, 0] = False
    return PromptBatch(tokens_BP, mask_BP, torch.zeros(COUNT, dtype=torch.bool), torch.arange(COUNT))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("TORCHDYNAMO_DISABLE", "1"), ("VLLM_USE_AOT_COMPILE", "0")):
            patch.setenv(name, value)  # compiling takes longer than all of these tests
        with connection(None, tmp_path_factory.mktemp("ray")):
            yield


@pytest.fixture(scope="module")
def pool(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> PooledSampler:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("model", 5), ("another", 7)):
        make(seed).save_pretrained(folder / name)
    pool = open_pool("pool", HARDWARE, 2)(folder / "model", ([EOS], PAD), Capacity(2, 4 + R))
    pool.folder = folder  # type: ignore[attr-defined]
    return pool


def agrees(rollout: Any, seed: int) -> None:
    """With the logprobs of a plain forward pass of `make(seed)`."""
    expected_BR, _ = PolicyModel(make(seed))(rollout.tokens_BT, rollout.mask_BT, R, TEMPERATURE)
    mask_BR = rollout.response_mask_BR
    got = rollout.behaviour_logprobs_BR[mask_BR]
    torch.testing.assert_close(got, expected_BR[mask_BR], atol=SAME["float32"], rtol=0)


@installed
def test_logprobs_are_those_of_the_weights_that_were_sent_last(pool: PooledSampler) -> None:
    for seed in (0, 1):
        model = make(seed)
        assert pool.load_weights(passing(model)) == 4 * sum(p.numel() for p in model.parameters())
        rollout = pool.sample(prompts(), SETTINGS, 0, 1)
        assert torch.equal(rollout.tokens_BT[:, :-R], prompts().tokens_BP)
        agrees(rollout, seed)
    assert pool.take(pool.folder / "another")  # type: ignore[attr-defined]
    agrees(pool.sample(prompts(), SETTINGS, 0, 1), 7)


@installed
def test_the_prompts_of_an_engine_that_is_killed_are_sampled_again(pool: PooledSampler) -> None:
    import ray

    pool.load_weights(passing(make(0)))
    expected = pool.sample(prompts(), SETTINGS, 0, 3)
    victim: Any = ray.get(pool._engines[0].pid.remote())
    killer = threading.Timer(0.05, lambda: os.kill(victim, signal.SIGKILL))
    killer.start()
    rollout = pool.sample(prompts(), SETTINGS, 0, 3)
    killer.join()
    after = ray.get(pool._engines[0].pid.remote())
    assert after != victim
    assert torch.equal(rollout.tokens_BT, expected.tokens_BT)
    assert torch.equal(rollout.behaviour_logprobs_BR, expected.behaviour_logprobs_BR)


@installed
def test_what_the_caller_raises_ends_the_wait(pool: PooledSampler) -> None:
    def refuse() -> None:
        raise ValueError("the update failed")

    with pytest.raises(ValueError, match="the update failed"):
        pool.sample(prompts(), SETTINGS, 0, 1, refuse)


@installed
def test_samplers_without_room_are_told(cluster: None, tmp_path: Path) -> None:
    make(5).save_pretrained(tmp_path)
    start = time.monotonic()
    hardware = HARDWARE.model_copy(update={"placement_timeout_s": 5.0, "cpus_per_worker": 64})
    with pytest.raises(UserError, match="1 of 1 samplers did not start within 5 s") as told:
        open_pool("large", hardware, 1)(tmp_path, ([EOS], PAD), Capacity(2, 4 + R))
    assert told.value.exit_code == 5 and time.monotonic() - start < 60


def test_a_checksum_sees_one_bit_and_the_order() -> None:
    def of(*tensors: torch.Tensor) -> int:
        checksum = Checksum()
        assert [name for name, _ in checksum.of(("w", tensor) for tensor in tensors)] == ["w"] * len(tensors)
        return checksum.value

    one, two = torch.randn(5, 3), torch.randn(7).bfloat16()
    changed = one.clone()
    changed.view(torch.int32)[2, 1] ^= 1
    assert of(one, two) == of(one.clone(), two.clone())
    assert len({of(one, two), of(two, one), of(changed, two), of(one), of(one, two[:6])}) == 5
