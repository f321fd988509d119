"""Arithmetic of a model against torch's own count of what its operators did; a machine that is measured and undisturbed."""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf.config import LoraConfig
from rlhf.models import add_lora
from rlhf.models.policy import PolicyModel
from rlhf.profiling.roofline import Machine, ModelSize, backward_flops, forward_flops, measure, size_of, together

T, HIDDEN, INNER, LAYERS, VOCAB = 13, 16, 24, 2, 12  # of the `make_llama` fixture, whose two heads have 8 features
TRUNK = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)


@pytest.fixture
def llama(make_llama):
    return copy.deepcopy(make_llama(0)).requires_grad_(True)  # with a config of its own, which a test changes


def counted(llama) -> tuple[int, int]:
    """FLOPs of the operators in forward and backward. They compute attention to every token, of which a causal model
    needs those before."""
    llama.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward:
        logits = llama(input_ids=torch.arange(T)[None] % VOCAB, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    needless = 4 * LAYERS * HIDDEN * (T * T - T * (T + 1) // 2)
    return forward.get_total_flops() - needless, backward.get_total_flops() - 2 * needless


def test_a_whole_models_arithmetic_is_what_torch_counts(llama):
    size = size_of(llama)
    forward, backward = counted(llama)
    assert forward_flops(size, torch.tensor([T]), T) == forward
    assert backward_flops(size, torch.tensor([T]), T) == backward


def test_the_size_of_a_llama_by_hand(llama):
    everything = sum(p.numel() for p in llama.parameters())
    expected = ModelSize(
        backbone=TRUNK,
        head=HIDDEN * VOCAB,
        backbone_learns=TRUNK,
        head_learns=HIDDEN * VOCAB,
        all_learn=everything,
        attention=LAYERS * HIDDEN,
        weight_bytes=4 * (TRUNK + HIDDEN * VOCAB),
        cache_bytes=4 * 2 * LAYERS * HIDDEN,
    )
    assert size_of(llama) == size_of(PolicyModel(llama)) == expected


def test_a_scalar_model_has_no_lm_head(make_scalar):
    size = size_of(make_scalar(0))
    assert (size.backbone, size.head) == (TRUNK + HIDDEN, 0)  # its own head is one more row, read at every token


def test_of_an_adapter_alone_the_weights_have_a_gradient(llama):
    size = size_of(add_lora(llama, LoraConfig(rank=2), "causal", 0))
    of_layer = 4 * 2 * (HIDDEN + HIDDEN) + 3 * 2 * (HIDDEN + INNER)
    assert size.backbone_learns == size.all_learn == LAYERS * of_layer
    assert (size.backbone, size.head_learns) == (TRUNK + LAYERS * of_layer, 0)


def test_a_shard_counts_with_its_whole_shape(llama):
    whole = size_of(llama)
    for p in llama.parameters():
        vars(p).update(ds_shape=p.shape, ds_numel=p.numel())  # as DeepSpeed does
        p.data = torch.empty(0)
    assert size_of(llama) == whole


def test_rows_and_predicted_tokens_by_hand():
    size = ModelSize(10, 100, 10, 100, 0, 5, 0, 0)
    lengths_B = torch.tensor([2, 3])  # 3 and 6 pairs
    assert forward_flops(size, lengths_B, 1) == 2 * (10 * 5 + 100) + 4 * 5 * 9
    assert backward_flops(size, lengths_B, 1) == 4 * (10 * 5 + 100) + 8 * 5 * 9


def test_a_machine_needs_the_longer_of_arithmetic_and_memory():
    machine = together([Machine(60.0, 3.0), Machine(40.0, 7.0)])
    assert machine == Machine(100.0, 10.0)
    assert machine.seconds(1000.0, 50.0) == 10
    assert machine.seconds(100.0, 50.0) == 5


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_measuring_is_short_and_draws_from_no_generator_of_the_run(precision):
    before, start = torch.get_rng_state(), time.process_time()
    machine = measure(torch.device("cpu"), precision)
    assert time.process_time() - start < 4  # of processor time; some tenths of it are usual
    assert torch.equal(torch.get_rng_state(), before)
    assert machine.flops > 1e8 and machine.bandwidth > 1e8


def test_a_faster_product_makes_a_faster_machine(monkeypatch):
    """Under a clock that ticks once per look, every try takes 1 s."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("rlhf.profiling.roofline.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert measure(torch.device("cpu"), "float32") == Machine(2.0 * 256**3, float(1 << 28))
