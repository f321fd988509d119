"""What this machine can do at best, measured, and from it the least time that sampling could take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from rlhf.sampling.linear import Linear

PRODUCT_ROWS = 512  # enough that a product is bound by arithmetic
READ_BYTES = 1 << 29  # more than any cache


@dataclass(frozen=True)
class Machine:
    flops: float  # of a matrix product, per second
    bandwidth: float  # bytes read from memory, per second


@dataclass(frozen=True)
class Work:
    """A model in numbers."""

    trunk: int  # parameters in matrix products per token, without the LM head
    head: int
    weight_bytes: int  # of both
    cache_bytes: int  # keys and values of one token


def best_of(machines: Sequence[Machine]) -> Machine:
    """The limit is what a machine has shown at its best: other programs only slow it down."""
    return Machine(max(m.flops for m in machines), max(m.bandwidth for m in machines))


def measure(dtype: torch.dtype, width: int, inner: int) -> Machine:
    """The faster of torch's product and the packed one, at the shape of the model's largest layers."""
    x, weight = torch.randn(PRODUCT_ROWS, width).to(dtype), torch.randn(inner, width).to(dtype)
    packed, buffer = Linear(weight), torch.ones(READ_BYTES // 4)
    seconds = min(best(lambda: F.linear(x, weight)), best(lambda: packed(x)))
    return Machine(2 * PRODUCT_ROWS * width * inner / seconds, READ_BYTES / best(buffer.sum))


def best(run: Callable[[], Any], repeats: int = 10) -> float:
    """The shortest of several times, in seconds."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def work_of(model: Any) -> Work:
    config, head = model.config, model.get_output_embeddings().weight
    tables = {id(model.get_input_embeddings().weight), id(head)}
    trunk = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Work(
        trunk=trunk,
        head=head.numel(),
        weight_bytes=(trunk + head.numel()) * head.element_size(),
        cache_bytes=2 * config.num_hidden_layers * heads * size * head.element_size(),
    )


def least_seconds(
    machine: Machine, work: Work, prompt_lengths: Sequence[int], answer_lengths: Sequence[int], rows: int
) -> float:
    """Arithmetic of reading the prompts, then per step the slower of arithmetic and streaming the weights, then keys
    and values read once per token. Steps: as few as `rows` slots allow. Everything else would take no time.
    """
    steps_of_rows = [length - 1 for length in answer_lengths]  # the first token comes with the prompt
    tokens = sum(steps_of_rows)
    steps = max(-(-tokens // rows), max(steps_of_rows, default=0))
    reading = 2 * (work.trunk * sum(prompt_lengths) + work.head * len(prompt_lengths)) / machine.flops
    arithmetic = 2 * (work.trunk + work.head) * tokens / machine.flops
    streaming = steps * work.weight_bytes / machine.bandwidth
    seen = sum(n * p + n * (n + 1) // 2 for p, n in zip(prompt_lengths, steps_of_rows, strict=True))
    return reading + max(arithmetic, streaming) + seen * work.cache_bytes / machine.bandwidth
