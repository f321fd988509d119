"""Two ranks that share an engine of vLLM: half a model each, and the responses of one that has the whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlhf.config import SamplingConfig
from rlhf.data.batches import PromptBatch, Rollout, select
from rlhf.generation.vllm import Capacity, VLLMSampler
from rlhf.models.policy import PolicyModel
from tests.rlhf.generation.test_vllm import EOS, PAD, SAME, SLOTS, R, installed, make, passing
from tests.worker_group import leave, run_ranks

TEMPERATURE = 0.7
LAYERS = 2  # of `make`
SETTINGS = SamplingConfig(engine="vllm", tensor_parallel=2, temperature=TEMPERATURE, max_new_tokens=R)
OF_RANKS = (slice(0, 5), slice(5, 8))  # prompts
SCENES = ("uneven", "nothing to do on one rank", "another folder")


def prompts() -> PromptBatch:
    tokens_BP = torch.randint(3, 12, (8, 4), generator=torch.Generator().manual_seed(0))
    mask_BP = torch.ones_like(tokens_BP, dtype=torch.bool)
    mask_BP[::2, 0] = False
    return PromptBatch(tokens_BP, mask_BP, torch.zeros(8, dtype=torch.bool), torch.arange(8))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """scene → rollouts of the two ranks; `sizes`: of its matrices; the same of one engine."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, seed in (("model", 5), ("another folder", 7)):
        make(seed).save_pretrained(folder / name)
    run_ranks(__file__, folder, ranks=2, timeout=300)
    run_ranks(__file__, folder, ranks=1, timeout=300)
    return torch.load(folder / "1 of 1.pt", weights_only=False) | {
        rank: torch.load(folder / f"{rank} of 2.pt", weights_only=False) for rank in (0, 1)
    }


def together(sampled: Any, scene: str) -> list[tuple[list[int], torch.Tensor]]:
    """(tokens, logprobs) of all responses."""
    return [response for rank in (0, 1) for response in responses(sampled[rank][scene])]


def responses(rollout: Rollout) -> list[tuple[list[int], torch.Tensor]]:
    rows = zip(rollout.tokens_BT[:, -R:], rollout.response_mask_BR, rollout.behaviour_logprobs_BR, strict=True)
    return [(tokens[mask].tolist(), logprobs[mask]) for tokens, mask, logprobs in rows]


@installed
@pytest.mark.parametrize(("scene", "seed"), [("uneven", 0), ("another folder", 7)])
def test_logprobs_are_those_of_the_whole_model(sampled: Any, scene: str, seed: int) -> None:
    for rank in (0, 1):
        rollout = sampled[rank][scene]
        expected_BR, _ = PolicyModel(make(seed))(rollout.tokens_BT, rollout.mask_BT, R, TEMPERATURE)
        mask_BR = rollout.response_mask_BR
        torch.testing.assert_close(
            rollout.behaviour_logprobs_BR[mask_BR], expected_BR[mask_BR], atol=SAME["float32"], rtol=0
        )


@installed
def test_each_rank_has_the_responses_of_its_own_prompts(sampled: Any) -> None:
    for rank, rows in enumerate(OF_RANKS):
        rollout, mine = sampled[rank]["uneven"], select(prompts(), rows)
        assert torch.equal(rollout.tokens_BT[:, :-R], mine.tokens_BP)


@installed
@pytest.mark.parametrize("scene", SCENES)
def test_responses_are_those_of_an_engine_that_has_the_whole_model(sampled: Any, scene: str) -> None:
    assert [tokens for tokens, _ in together(sampled, scene)] == [tokens for tokens, _ in responses(sampled[scene])]


@installed
def test_a_rank_without_prompts_helps_the_other(sampled: Any) -> None:
    assert [len(sampled[rank]["nothing to do on one rank"].tokens_BT) for rank in (0, 1)] == [8, 0]


@installed
def test_each_rank_holds_half_of_every_matrix(sampled: Any) -> None:
    whole = sampled["sizes"]
    assert len(whole) == 3 * LAYERS + 2  # table and head
    assert all(sampled[rank]["sizes"] == {name: size // 2 for name, size in whole.items()} for rank in (0, 1))


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Linear layers but for query, key and value: the one head of keys is on both ranks."""
    for name, part in model.named_modules():
        if hasattr(part, "output_size_per_partition") and "qkv" not in name:
            yield name, part


def main(folder: Path) -> None:
    """One of the ranks, or the only one."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch._dynamo.config.patch(disable=True):
        own = [EOS], PAD, "float32", torch.device("cpu"), Capacity(SLOTS, 4 + R, world)
        sampler: Any = VLLMSampler(folder / "model", *own)
        told: dict[str, Any] = {}
        sampler.load_weights(passing(make(0)))
        rows = (slice(None),) if world == 1 else OF_RANKS
        told["uneven"] = sampler.sample(select(prompts(), rows[rank]), SETTINGS, 0, 1)
        rows = (slice(None), slice(8, 8))
        told["nothing to do on one rank"] = sampler.sample(select(prompts(), rows[rank]), SETTINGS, 0, 2)
        assert sampler.take(folder / "another folder")
        rows = (slice(None),) if world == 1 else OF_RANKS
        told["another folder"] = sampler.sample(select(prompts(), rows[rank]), SETTINGS, 0, 3)
        model = sampler.llm.llm_engine.model_executor.driver_worker.worker.get_model()
        told["sizes"] = {
            name: part.input_size_per_partition * part.output_size_per_partition for name, part in layers(model)
        }
    torch.save(told, folder / f"{rank if world > 1 else 1} of {world}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
