"""Several responses per prompt: the seconds that sharing the prompt saves in sampling, scoring and update.

    python -m benchmarks.shared_prompts --model FOLDER --out shared_prompts.json

Both sides have rows of the same lengths and the same code, with packing. shared: responses share a prompt.
apart: every response has its own prompt. Tokens are random; the sides take turns.

sample: `InProcessSampler`, no response ends. read: the policy's logprobs, without gradient. learn: with forward and
backward pass. The last two in the passes that `rlhf.distributed.micro_batches` makes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import turns
from benchmarks.packing import blank
from benchmarks.side import NEVER
from rlhf.config import PPOConfig, SamplingConfig
from rlhf.data.batches import Experience, PromptBatch, select, trim
from rlhf.distributed.micro_batches import micro_batches_of_minibatch, tokens_of_minibatch
from rlhf.generation import InProcessSampler
from rlhf.models import load_causal
from rlhf.models.policy import PolicyModel

SIDES = ("apart", "shared")


@dataclass(frozen=True)
class Setting:
    """What one line of the table compares."""

    prompts: int
    prompt_tokens: int
    answers: int  # to each prompt
    answer_tokens: int
    pass_tokens: int  # at once, at most

    @property
    def config(self) -> PPOConfig:
        return PPOConfig(packing=True, micro_batch_tokens=self.pass_tokens, group_size=self.answers)


def experience(setting: Setting, side: str, vocab: int, seed: int) -> Experience:
    """Rows of one length, responses of a prompt next to each other."""
    generator = torch.Generator().manual_seed(seed)
    B, P, R = setting.prompts * setting.answers, setting.prompt_tokens, setting.answer_tokens
    tokens_BT = torch.randint(3, vocab, (B, P + R), generator=generator)
    if side == "shared":
        tokens_BT[:, :P] = tokens_BT[:: setting.answers, :P].repeat_interleave(setting.answers, 0)
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    return blank(tokens_BT, mask_BT, mask_BT[:, P:])


def sample(model: Any, setting: Setting, given: Experience, seed: int) -> None:
    B, P = len(given.tokens_BT), setting.prompt_tokens
    prompts = PromptBatch(
        given.tokens_BT[:, :P], given.mask_BT[:, :P], torch.zeros(B, dtype=torch.bool), torch.arange(B)
    )
    settings = SamplingConfig(max_new_tokens=setting.answer_tokens, batch_size=B)
    InProcessSampler(model, [NEVER], 0).sample(prompts, settings, seed, 0)


def read(model: Any, setting: Setting, given: Experience, seed: int) -> None:
    with torch.no_grad():
        _passes(model, setting, given)


def learn(model: Any, setting: Setting, given: Experience, seed: int) -> None:
    model.requires_grad_(True)
    for logprobs_BR in _passes(model, setting, given, backward=True):
        assert logprobs_BR.isfinite().all()
    model.zero_grad()


def _passes(model: Any, setting: Setting, given: Experience, backward: bool = False) -> list[torch.Tensor]:
    policy, everything, read = PolicyModel(model, packing=True), torch.arange(len(given.tokens_BT)), []
    for index in micro_batches_of_minibatch(given, everything, 0, 1, setting.config):
        part = trim(select(given, index))
        logprobs_BR, _ = policy(part.tokens_BT, part.mask_BT, part.response_mask_BR.shape[1], 1.0)
        if backward:
            logprobs_BR.sum().backward()
        read.append(logprobs_BR.detach())
    return read


PHASES: dict[str, Callable[[Any, Setting, Experience, int], None]] = {"sample": sample, "read": read, "learn": learn}


def compare(model: Any, setting: Setting, repeats: int) -> dict[str, Any]:
    """Every phase and side `repeats` times in turn, after one turn that is not counted."""
    vocab = model.config.vocab_size
    seconds: dict[str, dict[str, list[float]]] = {phase: {side: [] for side in SIDES} for phase in PHASES}
    tokens = {}
    for seed in range(-1, repeats):
        for side in SIDES:
            given = experience(setting, side, vocab, seed + 1)
            tokens[side] = tokens_of_minibatch(given, torch.arange(len(given.tokens_BT)), 1, setting.config)
            for phase, run in PHASES.items():
                start = time.perf_counter()
                run(model, setting, given, seed + 1)
                if seed >= 0:
                    seconds[phase][side].append(time.perf_counter() - start)
    medians = {
        phase: {side: statistics.median(times) for side, times in sides.items()} for phase, sides in seconds.items()
    }
    return asdict(setting) | {
        "tokens": tokens,
        "seconds": seconds,
        "median": medians,
        "times": {phase: sides["apart"] / sides["shared"] for phase, sides in medians.items()},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    heads = ["prompts", "of tokens", "answers to each", "of tokens", "tokens read, apart", "shared"]
    heads += [f"{phase}, s apart / shared" for phase in PHASES]
    lines = []
    for r in results:
        cells = [r["prompts"], r["prompt_tokens"], r["answers"], r["answer_tokens"], *r["tokens"].values()]
        for phase, sides in r["median"].items():
            cells.append(f"{sides['apart']:.2f} / {sides['shared']:.2f} = {r['times'][phase]:.2f}")
        lines.append([str(cell) for cell in cells])
    return turns.table(heads, lines)


def tiny() -> Any:
    """A random model, for a run of seconds."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, results = tiny() if args.quick else load_causal(args.model), []
    for prompt_tokens in args.prompt_tokens:
        for answers in args.answers:
            setting = Setting(args.prompts, prompt_tokens, answers, args.answer_tokens, args.pass_tokens)
            results.append(compare(model, setting, args.repeats))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    arguments_used = {name: value for name, value in vars(args).items() if name != "out"}
    record = {"torch": torch.__version__, "processor": platform.processor(), "arguments": arguments_used}
    args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    print(f"\nthreads {args.threads}, median of {args.repeats}\n\n{table(results)}")
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a model folder or hub name")
    source.add_argument("--quick", action="store_true", help="a random model of some ten thousand parameters")
    parser.add_argument("--out", type=Path, default=Path("shared_prompts.json"), help="file for every figure")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--answers", type=int, nargs="+", default=[4])
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--pass-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


if __name__ == "__main__":
    main()
