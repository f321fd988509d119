"""PPO's update phase against a bare torch loop over the same packed tokens: tokens per second.

    python -m benchmarks.update --model FOLDER --out update.json

ours: `rlhf.ppo.update.update`, the whole phase of one epoch: packed micro-batches, the losses of policy and critic with
all metrics, clipped gradients, two optimizer steps.

bare: transformers' models over the same packed micro-batches, cross-entropy of the response tokens (the LM head runs on
them only) and squared values, forward and backward, and nothing else: no optimizer, no clipping, no metrics.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.packing import experience
from benchmarks.shapes import given_or_random
from benchmarks.turns import device_of, in_turns, parser_of, report, table
from rlhf.config import HardwareConfig, OptimConfig, PPOConfig
from rlhf.data.batches import Experience, select, to, trim
from rlhf.distributed.engine import LocalEngine
from rlhf.distributed.micro_batches import micro_batches_of_minibatch
from rlhf.models import ScalarModel, load_causal
from rlhf.models.policy import PolicyModel
from rlhf.ppo.update import minibatches, update
from rlhf.profiling.roofline import wait


def our_seconds(policy: LocalEngine, critic: LocalEngine, given: Experience, config: PPOConfig) -> float:
    start = time.perf_counter()
    update(policy, critic, given, config, (0, 1), kl_loss_coef=0.0)  # its figures wait for the device
    return time.perf_counter() - start


def bare_seconds(
    policy: Any, critic: Any, given: Experience, config: PPOConfig, device: torch.device, bf16: bool
) -> float:
    """The loop that a person would write first, over the passes of `our_seconds`."""
    start = time.perf_counter()
    for index in minibatches(len(given.tokens_BT), config, 0, 1):
        for mine in micro_batches_of_minibatch(given, index, 0, 1, config):
            part = to(trim(select(given, mine)), device)
            mask_BT = part.mask_BT
            answer_BT = F.pad(part.response_mask_BR, (mask_BT.shape[1] - part.response_mask_BR.shape[1], 0))
            predicts_N = answer_BT.roll(-1, 1)[mask_BT]
            inputs = {
                "input_ids": part.tokens_BT[mask_BT][None],
                "position_ids": (mask_BT.cumsum(1) - 1)[mask_BT][None],
                "use_cache": False,
            }
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden_NH = policy.model(**inputs).last_hidden_state[0, predicts_N]
                loss = F.cross_entropy(policy.lm_head(hidden_NH).float(), part.tokens_BT[answer_BT], reduction="sum")
            loss.backward()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = critic.head(critic.backbone(**inputs).last_hidden_state[0, predicts_N]).float().square().sum()
            loss.backward()
    wait(device)
    seconds = time.perf_counter() - start
    policy.zero_grad()
    critic.zero_grad()
    return seconds


def compare(args: Any, path: Path) -> dict[str, Any]:
    device = device_of(args.device)
    config = PPOConfig(minibatch_size=args.rows, micro_batch_tokens=args.pass_tokens, packing=True)
    hardware = HardwareConfig(precision=args.precision)

    def causal() -> Any:
        model: Any = load_causal(path)
        return model.to(device)

    learner = causal()
    hidden, vocabulary = learner.config.hidden_size, learner.config.vocab_size
    policy = PolicyModel(learner, packing=True)
    critic: Any = ScalarModel(causal().base_model, torch.zeros(1, hidden)).to(device)
    critic.packing = True
    engines = [LocalEngine(module, OptimConfig(lr=0.0), 1000, hardware) for module in (policy, critic)]
    bare_critic = nn.ModuleDict({"backbone": causal().base_model, "head": nn.Linear(hidden, 1, bias=False).to(device)})
    given = experience(vocabulary, args.rows)
    bf16 = args.precision == "bf16"
    sides = {
        "bare": partial(bare_seconds, causal(), bare_critic, given, config, device, bf16),
        "ours": partial(our_seconds, *engines, given, config),
    }
    in_turns(sides, 1)  # to warm up
    tokens = int(given.mask_BT.sum())
    rates = {name: [tokens / seconds for seconds in turns] for name, turns in in_turns(sides, args.repeats).items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens": tokens,
        "passes": len(micro_batches_of_minibatch(given, torch.arange(args.rows), 0, 1, config)),
        "tokens_per_second": rates,
        "median": medians,
        "ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)),
    }


def shown(result: dict[str, Any]) -> str:
    head = ["tokens", "passes", "bare forward and backward, tokens/s", "ours, tokens/s", "ours / bare"]
    bare, ours = (f"{result['median'][name]:.0f}" for name in ("bare", "ours"))
    return table(head, [[str(result["tokens"]), str(result["passes"]), bare, ours, f"{result['ratio']:.2f}"]])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of("update", __doc__)
    parser.add_argument("--rows", type=int, default=16, help="answers, one minibatch (default 16)")
    parser.add_argument("--pass-tokens", type=int, default=512, help="of a packed pass, at most (default 512)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args, given_or_random(args.model, "tiny" if args.quick else args.shape, Path(folder)))
    report(args, result, shown(result))
    return result


if __name__ == "__main__":
    main()
