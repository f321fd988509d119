"""Measured peak rates of this machine, and the least time of sampling that follows from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from rlhf.kernels.linear import Linear
from rlhf.profiling.roofline import Machine, ModelSize, best_seconds, least_steps, tokens_seen

PRODUCT_ROWS = {"cpu": 512, "cuda": 16384}  # enough that a product is bound by arithmetic
READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}  # more than any cache; on a GPU long beside the call


def best_of(machines: Sequence[Machine]) -> Machine:
    """The best rates that were measured: other programs only slow a machine down."""
    return Machine(max(m.flops for m in machines), max(m.bandwidth for m in machines))


def measure(device: torch.device, dtype: torch.dtype, width: int, inner: int) -> Machine:
    """The faster of torch's product and the packed one, at the shape of the model's largest layers."""
    rows = PRODUCT_ROWS[device.type]
    x, weight = (torch.randn(count, width, device=device).to(dtype) for count in (rows, inner))
    packed, buffer = Linear(weight), torch.ones(READ_BYTES[device.type] // 4, device=device)
    products = (lambda: F.linear(x, weight), lambda: packed(x))
    seconds = min(best_seconds(product, device, repeats=10) for product in products)
    reading = best_seconds(buffer.sum, device, repeats=10)
    return Machine(2 * rows * width * inner / seconds, READ_BYTES[device.type] / reading)


def least_seconds(
    machine: Machine, size: ModelSize, prompt_lengths: Sequence[int], answer_lengths: Sequence[int], rows: int
) -> float:
    """The time of reading the prompts, plus per step the longer of arithmetic and reading the weights, plus reading
    keys and values once per token. Steps: as few as `rows` slots allow. Everything else counts as 0.
    """
    stepped_B = torch.tensor(answer_lengths) - 1  # the first token comes with the prompt
    tokens = int(stepped_B.sum())
    reading = 2 * (size.backbone * sum(prompt_lengths) + size.head * len(prompt_lengths)) / machine.flops
    arithmetic = 2 * (size.backbone + size.head) * tokens / machine.flops
    streaming = least_steps(stepped_B, rows) * size.weight_bytes / machine.bandwidth
    seen = tokens_seen(torch.tensor(prompt_lengths), stepped_B)
    return reading + max(arithmetic, streaming) + seen * size.cache_bytes / machine.bandwidth
