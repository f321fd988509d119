"""Roofline: the measured peak rates of a machine, and the FLOPs and bytes that a model needs.

Counted as by Kaplan et al. 2020 (§2.1) and Chowdhery et al. 2022 (App. B): two FLOPs per weight and token in each
matrix product of a dense model, with its LM head where a token is predicted, and four per feature of every (query, key)
pair of causal attention. Not counted: norms, softmax, embedding rows, the optimizer, padding, and anything computed
twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SIDES = (256, 512, 1024, 2048, 4096, 8192)
LONG_ENOUGH_S = 0.005  # a matrix product that takes this long is compute-bound
READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # larger than any cache; on a GPU long compared with the launch


@dataclass(frozen=True)
class Machine:
    flops: float  # FLOP/s of a matrix product
    bandwidth: float  # bytes/s read from memory

    def seconds(self, flops: float, bytes: float) -> float:
        """The least time for this many FLOPs and bytes (roofline, Williams et al. 2009)."""
        return max(flops / self.flops, bytes / self.bandwidth)


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model. Weights of matrix products: `backbone` for every token, `head` where a token is predicted."""

    backbone: int
    head: int
    backbone_learns: int  # of `backbone`, those that get a gradient
    head_learns: int
    all_learn: int  # every weight that the optimizer steps, with embeddings and norms
    attention: int  # layers · query heads · head size
    weight_bytes: int  # of backbone and head
    cache_bytes: int  # keys and values of one token


def measure(device: torch.device, precision: str) -> Machine:
    """The rates that this process reaches now in the run's precision: the best of a few tries, in about 0.3 s.

    Uses no random generator of the run.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Machine(_matrix_rate(device, dtype), _bandwidth(device))


def together(machines: Iterable[Machine]) -> Machine:
    """Workers that measured at the same time, as one machine."""
    machines = list(machines)
    return Machine(sum(m.flops for m in machines), sum(m.bandwidth for m in machines))


def size_of(module: nn.Module) -> ModelSize:
    """The sizes of a dense transformers model, or of one of our wrappers; shards know their whole shape."""
    model = next((part for part in module.modules() if isinstance(part, PreTrainedModel)), None)
    head = model.get_output_embeddings() if model is not None else None
    head_weight = getattr(head, "weight", None)
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)} | {id(head_weight)}
    backbone = [p for p in module.parameters() if len(_shape(p)) == 2 and id(p) not in tables]
    heads = [p for p in module.parameters() if p is head_weight]
    attention, cached = _attention(model.config.get_text_config()) if model is not None else (0, 0)
    return ModelSize(
        backbone=_count(backbone),
        head=_count(heads),
        backbone_learns=_count(p for p in backbone if p.requires_grad),
        head_learns=_count(p for p in heads if p.requires_grad),
        all_learn=_count(p for p in module.parameters() if p.requires_grad),
        attention=attention,
        weight_bytes=sum(_count([p]) * p.element_size() for p in (*backbone, *heads)),
        cache_bytes=cached * next(module.parameters()).element_size(),
    )


def forward_flops(size: ModelSize, length_B: Tensor, predicted: int, shared_B: Tensor | int = 0) -> float:
    """FLOPs of one forward pass over rows of these lengths. `predicted`: tokens at which the LM head runs. `shared_B`:
    tokens at the start of each row that another row has already read."""
    products = 2 * (size.backbone * int((length_B - shared_B).sum()) + size.head * predicted)
    return float(products + 4 * size.attention * (_pairs(length_B) - _pairs(torch.as_tensor(shared_B))))


def backward_flops(size: ModelSize, length_B: Tensor, predicted: int, shared_B: Tensor | int = 0) -> float:
    """FLOPs of the backward pass: as many as forward for the gradient of the inputs, twice as many in attention, plus
    those of trainable weights. For a fully trainable model, forward and backward are 6 per weight and token."""
    learns = 2 * (size.backbone_learns * int((length_B - shared_B).sum()) + size.head_learns * predicted)
    pairs = _pairs(length_B) - _pairs(torch.as_tensor(shared_B))
    return forward_flops(size, length_B, predicted, shared_B) + float(learns + 4 * size.attention * pairs)


def least_steps(stepped_B: Tensor, slots: int) -> int:
    """The least number of steps that draw this many tokens per row, with at most `slots` rows per step."""
    return max(-(-int(stepped_B.sum()) // slots), int(stepped_B.max()))


def tokens_seen(prompt_B: Tensor, stepped_B: Tensor) -> int:
    """Keys that these steps read, summed over tokens."""
    return int((stepped_B * prompt_B).sum()) + _pairs(stepped_B)


def best_seconds(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The shortest of several measurements."""
    times = []
    for _ in range(1 + repeats):  # warm-up
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wait(device: torch.device) -> None:
    """Waits until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    generator, rate = torch.Generator(device).manual_seed(0), 0.0
    for side in SIDES:
        a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
        seconds = best_seconds(lambda a=a, b=b: a @ b, device)
        rate = max(rate, 2 * side**3 / seconds)
        if seconds > LONG_ENOUGH_S:
            break
    return rate


def _bandwidth(device: torch.device) -> float:
    size = READ_BYTES[device.type]
    numbers = torch.ones(size // 4, device=device)
    return size / best_seconds(numbers.sum, device)


def _attention(config: Any) -> tuple[int, int]:
    """(layers · query heads · head size, numbers in the keys and values of one token)."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers * heads * size, 2 * config.num_hidden_layers * kept * size


def _pairs(length_B: Tensor) -> int:
    """(query, key) pairs of causal attention: a token sees itself and the tokens before it."""
    return int((length_B * (length_B + 1) // 2).sum())


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
