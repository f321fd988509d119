"""Our sampler against transformers' `generate` and vLLM: useful tokens per second, and the fraction of the machine's
limit.

    python -m benchmarks.sampling --model FOLDER --out sampling.json

All sides run the same weights on the same prompts at one temperature, take turns, and use the same threads. A useful
token belongs to a response, its EOS included; what `generate` computes for finished rows does not count. `generate`
gets its prompts sorted by length, `rows` at a time, so little of its batches is padding. vLLM takes part where it is
installed (`make vllm`), in the same process, compiled, with `rows` rows at once. On a CPU freed memory is kept for all
of them, as in PPO.

fixed: as many prompts as rows; no response ends early.
natural: twice as many prompts as rows; a response ends where the model ends it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reward_data
from benchmarks import turns
from benchmarks.limits import best_of, least_seconds, measure
from benchmarks.shapes import given_or_random
from benchmarks.side import NEVER
from rlhf.config import SamplingConfig
from rlhf.data import pad, prompt_batch, short_prompts
from rlhf.data.batches import PromptBatch, select, to
from rlhf.generation import InProcessSampler
from rlhf.generation.vllm import Capacity, VLLMSampler
from rlhf.models import load_causal, load_tokenizer
from rlhf.profiling.memory import keep_freed_memory
from rlhf.profiling.roofline import size_of

PROMPTS_PER_ROW = {"fixed": 1, "natural": 2}


@dataclass(frozen=True)
class Setting:
    """What one line of the table compares."""

    precision: str
    rows: int
    lengths: str
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Subject:
    """A model with prompts; `sampler` and `generate` share its weights, and `vllm` has a copy where it takes part."""

    model: Any
    sampler: InProcessSampler
    prompts: PromptBatch
    eos_id: int
    pad_id: int
    vllm: VLLMSampler | None = None


Side = Callable[[Subject, Setting, PromptBatch, int], list[int]]


def ours(subject: Subject, setting: Setting, prompts: PromptBatch, seed: int) -> list[int]:
    """The lengths of the responses."""
    return _sampled(subject.sampler, subject, setting, prompts, seed)


def vllm(subject: Subject, setting: Setting, prompts: PromptBatch, seed: int) -> list[int]:
    """The lengths of the responses."""
    assert subject.vllm is not None
    return _sampled(subject.vllm, subject, setting, prompts, seed)


def _sampled(
    sampler: InProcessSampler | VLLMSampler, subject: Subject, setting: Setting, prompts: PromptBatch, seed: int
) -> list[int]:
    sampler.stop_ids = [_eos(subject, setting)]
    settings = SamplingConfig(
        temperature=setting.temperature, max_new_tokens=setting.max_new_tokens, batch_size=setting.rows
    )
    return sampler.sample(prompts, settings, seed, 0).response_mask_BR.sum(1).tolist()


def generate(subject: Subject, setting: Setting, prompts: PromptBatch, seed: int) -> list[int]:
    """The lengths of the responses."""
    torch.manual_seed(seed)
    lengths: list[int] = []
    order_B = prompts.mask_BP.sum(1).argsort(descending=True)
    for part in order_B.split(setting.rows):
        width = int(prompts.mask_BP[part].sum(1).max())
        tokens_GT = subject.model.generate(
            prompts.tokens_BP[part, -width:],
            attention_mask=prompts.mask_BP[part, -width:].long(),
            do_sample=True,
            temperature=setting.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=setting.max_new_tokens,
            eos_token_id=_eos(subject, setting),
            pad_token_id=subject.pad_id,
        )
        ends_GT = (tokens_GT[:, width:] == _eos(subject, setting)).long()
        lengths += (ends_GT.cumsum(1) - ends_GT == 0).sum(1).tolist()
    return lengths


SIDES: dict[str, Side] = {"generate": generate, "vllm": vllm, "ours": ours}


def _eos(subject: Subject, setting: Setting) -> int:
    return subject.eos_id if setting.lengths == "natural" else NEVER


def compare(subject: Subject, setting: Setting, repeats: int) -> dict[str, Any]:
    """Runs every side `repeats` times in turn after a warm-up turn, and measures the machine between them."""
    sides = {name: side for name, side in SIDES.items() if name != "vllm" or subject.vllm is not None}
    count = setting.rows * PROMPTS_PER_ROW[setting.lengths]
    prompts = select(subject.prompts, torch.arange(count) % len(subject.prompts.ids_B))
    prompts = replace(prompts, ids_B=torch.arange(count, device=subject.prompts.ids_B.device))
    prompt_lengths = prompts.mask_BP.sum(1).tolist()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    runs, machines, model = [], [], subject.model
    for seed in range(-1, repeats):
        machines.append(measure(model.device, model.dtype, model.config.hidden_size, model.config.intermediate_size))
        for name, side in sides.items():
            start = time.perf_counter()
            lengths = side(subject, setting, prompts, seed)
            seconds = time.perf_counter() - start
            if seed < 0:
                continue
            rates[name].append(sum(lengths) / seconds)
            if name == "ours":
                runs.append((lengths, seconds))
    machine, size = best_of(machines), size_of(model)
    shares = [least_seconds(machine, size, prompt_lengths, lengths, setting.rows) / s for lengths, s in runs]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return asdict(setting) | {
        "prompts": count,
        "prompt_tokens": sum(prompt_lengths) / count,
        "answer_tokens": sum(sum(lengths) for lengths, _ in runs) / (count * repeats),
        "tokens_per_second": rates,
        "median": medians,
        "times_generate": medians["ours"] / medians["generate"],
        "times_vllm": medians["ours"] / medians["vllm"] if "vllm" in medians else None,
        "machine": asdict(machine),
        "share_of_limit": statistics.median(shares),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    head = ["precision", "rows", "lengths", "tokens per prompt", "per answer", "`generate`, tokens/s", "vLLM, tokens/s"]
    head += ["ours, tokens/s", "times `generate`", "times vLLM", "share of the limit"]
    lines = []
    for r in results:
        theirs = (f"{r['median']['vllm']:.0f}", f"{r['times_vllm']:.2f}") if r["times_vllm"] else ("", "")
        cells = [r["precision"], str(r["rows"]), r["lengths"], f"{r['prompt_tokens']:.0f}", f"{r['answer_tokens']:.0f}"]
        cells += [f"{r['median']['generate']:.0f}", theirs[0], f"{r['median']['ours']:.0f}"]
        lines.append([*cells, f"{r['times_generate']:.2f}", theirs[1], f"{r['share_of_limit']:.2f}"])
    return turns.table(head, lines)


def tiny() -> tuple[Any, PromptBatch, int, int]:
    """A random model and prompts, for a run of seconds."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=0,
    )
    tokens_BP, mask_BP = pad([list(range(3, 3 + length)) for length in range(4, 12)], 0, left=True)
    batch = PromptBatch(tokens_BP, mask_BP, torch.zeros(8, dtype=torch.bool), torch.arange(8))
    return LlamaForCausalLM(config).eval(), batch, 2, 0


def given(model: Path, prompts: str, max_prompt_length: int) -> tuple[Any, PromptBatch, int, int]:
    tokenizer = load_tokenizer(model)
    short = short_prompts(tokenizer, reward_data.load("prompts", prompts, bad_rows="skip").rows, max_prompt_length)
    chosen = [short[i] for i in torch.randperm(len(short), generator=torch.Generator().manual_seed(0)).tolist()]
    batch = prompt_batch(tokenizer, chosen[:512], range(min(512, len(chosen))), max_prompt_length)
    return load_causal(model), batch, tokenizer.eos_token_id, tokenizer.pad_token_id


def vllm_is_there() -> bool:
    return importlib.util.find_spec("vllm") is not None


def open_vllm(subject: Subject, precision: str, count: int, longest: int) -> VLLMSampler:
    """An engine for `count` rows at once, with the weights of the model."""
    with tempfile.TemporaryDirectory() as folder:
        subject.model.config.save_pretrained(folder)
        device = subject.model.device
        sampler = VLLMSampler(
            Path(folder), [subject.eos_id], subject.pad_id, precision, device, Capacity(count, longest)
        )
    sampler.load_weights(subject.model.named_parameters())
    sampler.sleeps = False  # no trainer wants its memory
    return sampler


def open_subject(args: argparse.Namespace, folder: Path) -> Subject:
    """On the device of the arguments."""
    torch.manual_seed(0)
    if args.quick:
        model, prompts, eos_id, pad_id = tiny()
    else:
        model, prompts, eos_id, pad_id = given(
            given_or_random(args.model, args.shape, folder), args.prompts, args.max_prompt_length
        )
    sampler, device = InProcessSampler(model, [eos_id], pad_id, args.precision), turns.device_of(args.device)
    return Subject(model.to(device), sampler, to(prompts, device), eos_id, pad_id)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        subject = open_subject(args, Path(folder))
    results = []
    longest = subject.prompts.tokens_BP.shape[1] + max(args.fixed_tokens, args.natural_tokens)
    for count in args.rows:
        if vllm_is_there():
            subject = replace(subject, vllm=None)
            gc.collect()  # the engine before this one
            subject = replace(subject, vllm=open_vllm(subject, args.precision, count, longest))
        for lengths in args.lengths:
            limit = args.fixed_tokens if lengths == "fixed" else args.natural_tokens
            results.append(
                compare(subject, Setting(args.precision, count, lengths, limit, args.temperature), args.repeats)
            )
            print(table(results[-1:]).splitlines()[-1], flush=True)
    turns.report(args, results, table(results))
    return results


def _parser() -> argparse.ArgumentParser:
    parser = turns.parser_of("sampling", __doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--prompts", default="shipped", help="a file that `reward_data` reads as prompts")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--lengths", nargs="+", choices=list(PROMPTS_PER_ROW), default=list(PROMPTS_PER_ROW))
    parser.add_argument("--fixed-tokens", type=int, default=48)
    parser.add_argument("--natural-tokens", type=int, default=128, help="where an answer that does not end is cut")
    parser.add_argument("--max-prompt-length", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    return parser


if __name__ == "__main__":
    main()
