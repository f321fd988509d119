"""The sizes of models against transformers and PEFT, constants against the code that allocates, sums against DeepSpeed's
estimate and against figures that were worked out by hand."""

from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rlhf.config import LoraConfig, ModelConfig, SamplingConfig
from rlhf.distributed import engine
from rlhf.generation import in_process, vllm
from rlhf.kernels import logprobs
from rlhf.models import saving
from rlhf.planning import activations, engines, phases, sampler
from rlhf.planning.engines import Layout, Model, offloaded, resting
from rlhf.planning.shapes import TABLE, ModelShape, from_config, shape_of

SHAPES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2},
    "wide heads": {"head_dim": 24, "num_key_value_heads": 1},
}
SHAPE_7B, SHAPE_13B, SHAPE_70B = (ModelShape(*TABLE[f"llama-2-{size}b"]) for size in (7, 13, 70))


def llama(**own):
    given: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    given |= {"num_attention_heads": 4} | own
    return LlamaConfig(**given)


def count(model, learns=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not learns)


@pytest.mark.parametrize("own", SHAPES.values(), ids=SHAPES)
def test_sizes_are_those_of_the_model(own):
    config = llama(**own)
    shape = from_config(config.to_dict())
    assert shape is not None
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        scalar = AutoModelForSequenceClassification.from_config(llama(**own, num_labels=1))
        adapted = peft.get_peft_model(
            AutoModelForCausalLM.from_config(config),
            peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    assert (shape.parameters, Model("", shape, scalar=True).base) == (count(causal), count(scalar))
    assert shape.adapter(LoraConfig(rank=4)) == count(adapted, learns=True)
    assert shape.largest == max(p.numel() for p in causal.parameters())
    assert shape.cached_numbers == 2 * 3 * (config.num_key_value_heads or 0) * (config.head_dim or 0)


def test_published_models_have_their_published_number_of_parameters():
    assert [s.parameters for s in (SHAPE_7B, SHAPE_13B, SHAPE_70B)] == [6738415616, 13015864320, 68976648192]
    assert shape_of(ModelConfig(path="meta-llama/Llama-2-13b-hf")) == SHAPE_13B
    assert shape_of(ModelConfig(path="somebody/other-13b")) is None


def test_other_layers_than_llamas_are_unknown():
    assert from_config({"model_type": "gpt2", "n_embd": 64}) is None


def test_constants_are_those_of_the_code_that_allocates():
    assert engines.BUCKET_ELEMENTS == engine.BUCKET_ELEMENTS
    assert engines.GATHER_BYTES == engine.BUCKET_BYTES
    assert sampler.IN_PROCESS == in_process.CACHE_FRACTION
    assert sampler.IN_BACKGROUND == in_process.CACHE_FRACTION_IN_BACKGROUND
    assert sampler.VLLM == vllm.CACHE_FRACTION
    assert activations.PREFILL_TOKENS == in_process.PREFILL_TOKENS
    assert {"cpu": activations.LOGIT_BLOCK[True], "cuda": activations.LOGIT_BLOCK[False]} == logprobs.BLOCK_BYTES
    assert phases.FILE_BYTES == saving.FILE_BYTES


def layout(workers, **own):
    return Layout(**{"workers": workers, "zero_stage": 3, "offload": False, "bf16": True, "cpu": False} | own)


def states(models, of, kinds=("weights", "float32 copies", "gradients", "optimizer")):
    return sum(part.bytes for model in models for part in resting(model, of) if part.kind in kinds)


def five(shape):
    trained = [Model("policy", shape, learns=True), Model("critic", shape, scalar=True, learns=True)]
    return [*trained, Model("reference", shape), *(Model(name, shape, scalar=True) for name in ("a", "b"))]


@pytest.mark.parametrize("workers", [1, 8, 64])
def test_states_agree_with_deepspeeds_own_estimate(workers):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as theirs

    shape, learns = SHAPE_13B, Model("policy", SHAPE_13B, learns=True)
    given = (shape.parameters, shape.largest, min(workers, 8), -(-workers // 8))
    _, device, largest = theirs(*given, cpu_offload=False)
    # It counts 18 bytes per parameter, for weights and gradients in half precision and float32 copies of both weights.
    assert states([learns], layout(workers)) == pytest.approx((device - largest) * 16 / 18, rel=1e-6)
    host, _, _ = theirs(*given, cpu_offload=True, cpu_offload_params=True, additional_buffer_factor=1.0)
    ours = sum(part.bytes for part in offloaded(learns, layout(workers, offload=True))) * min(workers, 8)
    assert 1.0 < ours / host < 24 / 18 + 0.01  # two float32 buffers of gradients, and float32 shards


def test_figures_that_were_worked_out_by_hand():
    """The figures of 0.1.0: float32 and bf16 copies at the end, the cache without a limit, and float32 on opening."""
    whole = {name: 4e-9 * shape.parameters for name, shape in (("7", SHAPE_7B), ("13", SHAPE_13B), ("70", SHAPE_70B))}
    end = {
        n: states(five(shape), layout(w)) * 1e-9 + 2 * whole[n]
        for n, shape, w in (("13", SHAPE_13B, 64), ("7", SHAPE_7B, 8))
    }
    assert end == {"13": pytest.approx(111.8, rel=0.01), "7": pytest.approx(86, rel=0.01)}
    free = 80e9 - states(five(SHAPE_7B), layout(8)) - SHAPE_7B.parameters * 2
    packed = 2 * 32 * 3 * 4096**2  # one matrix of query, key and value in each layer
    assert (free - packed) / (64 * 2 * SHAPE_7B.cached_numbers) == pytest.approx(930, rel=0.02)
    opening = sum(model.base for model in five(SHAPE_13B)) * 4e-9 / 8 + whole["13"]
    assert opening == pytest.approx(84.6, rel=0.01)
    assert (whole["70"] / 2, 2 * whole["70"]) == (pytest.approx(138, rel=0.01), pytest.approx(552, rel=0.01))
    assert 8 * whole["70"] == pytest.approx(2200, rel=0.01)


def test_workers_of_one_engine_divide_the_heads_of_keys_as_far_as_there_are_any():
    """70B has 80 layers and eight heads of keys of 128 numbers: half an engine of sixteen has copies."""
    for workers, bytes_of_a_token in ((1, 2 * 2 * 80 * 8 * 128), (8, 2 * 2 * 80 * 128), (16, 2 * 2 * 80 * 128)):
        settings = SamplingConfig(engine="vllm", tensor_parallel=workers)
        assert sampler.Sampler(SHAPE_70B, layout(64), settings, None).cache(1, 1) == bytes_of_a_token
