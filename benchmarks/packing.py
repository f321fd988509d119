"""Packed or padded: the seconds of forward and training passes of a Llama over responses of different lengths.

    python -m benchmarks.packing

Both sides read the same rows through `rlhf.distributed.micro_batches` and `PolicyModel`, in turns; the shortest time of
each counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config import PPOConfig
from rlhf.data.batches import Experience, select, trim
from rlhf.distributed.micro_batches import micro_batches_of_minibatch
from rlhf.models.policy import PolicyModel

ROWS, PROMPT, RESPONSE, ROUNDS = 64, 128, 128, 5
SHAPES: dict[str, dict[str, Any]] = {  # the model of the quickstart, and one that is sixteen times larger
    "1M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    "16M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
}
LIMITS: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 8},
    {"micro_batch_tokens": 512},
    {"micro_batch_tokens": 1024},
    {"micro_batch_tokens": 4096},
)


def experience(vocab: int, count: int = ROWS) -> Experience:
    """Prompts of 16 to 128 tokens, responses of 4 to 128, all lengths alike likely."""
    generator = torch.Generator().manual_seed(0)
    prompt_B1 = torch.randint(16, PROMPT + 1, (count, 1), generator=generator)
    response_B1 = torch.randint(4, RESPONSE + 1, (count, 1), generator=generator)
    response_mask_BR = torch.arange(RESPONSE) < response_B1
    mask_BT = torch.cat([torch.arange(PROMPT) >= PROMPT - prompt_B1, response_mask_BR], 1)
    tokens_BT = torch.randint(3, vocab, mask_BT.shape, generator=generator)
    return blank(tokens_BT, mask_BT, response_mask_BR)


def blank(tokens_BT: Tensor, mask_BT: Tensor, response_mask_BR: Tensor) -> Experience:
    """Experience in which every row counts, and all that was learned of it is 0."""
    zero_BR = torch.zeros(response_mask_BR.shape)
    return Experience(
        tokens_BT,
        mask_BT,
        response_mask_BR,
        counted_B=torch.ones(len(tokens_BT), dtype=torch.bool),
        old_logprobs_BR=zero_BR,
        ref_logprobs_BR=zero_BR,
        old_values_BR=zero_BR,
        advantages_BR=zero_BR,
        returns_BR=zero_BR,
        importance_BR=zero_BR,
        weight_BR=response_mask_BR.float(),
        denominator_B=response_mask_BR.sum(1).float(),
    )


def parts(given: Experience, config: PPOConfig) -> Iterator[Experience]:
    return (trim(select(given, index)) for index in micro_batches_of_minibatch(given, torch.arange(ROWS), 0, 1, config))


def read(policy: PolicyModel, part: Experience) -> Tensor:
    return policy(part.tokens_BT, part.mask_BT, part.response_mask_BR.shape[1], 1.0)[0]


def seconds(policy: PolicyModel, given: Experience, config: PPOConfig, learn: bool) -> float:
    policy.packing = config.packing
    start = time.perf_counter()
    with torch.set_grad_enabled(learn):
        for part in parts(given, config):
            logprobs_BR = read(policy, part)
            if learn:
                logprobs_BR.sum().backward()
    policy.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    print("| model | limit of a pass | passes padded, packed | read, padded / packed | learn, padded / packed |")
    print("|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        policy = PolicyModel(LlamaForCausalLM(LlamaConfig(vocab_size=768, max_position_embeddings=256, **shape)))
        given = experience(vocab=768)
        for limit in LIMITS:
            sides = [PPOConfig(**limit, packing=packing) for packing in (False, True)]
            passes = [str(len(list(parts(given, side)))) for side in sides]
            ratios = []
            for learn in (False, True):
                taken = [[seconds(policy, given, side, learn) for side in sides] for _ in range(ROUNDS)]
                padded, packed = (min(column) for column in zip(*taken, strict=True))
                ratios.append(f"{padded:.2f} s / {packed:.2f} s = {padded / packed:.2f}")
            limit_text = " ".join(f"`{key}` {value}" for key, value in limit.items())
            print(f"| {name} | {limit_text} | {', '.join(passes)} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
