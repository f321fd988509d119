"""What the end of a PPO stage asks of the memory, and whether it still samples from the right weights."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.generation import InProcessSampler, open_sampler, sampler_of
from rlhf.models import load_causal, load_tokenizer, saving
from rlhf.ppo import best, trainer
from stages import ppo

pytestmark = pytest.mark.integration

ALL_BUT_PPO = "reward/safety"


class LiveBytes:
    """Bytes of all parameters, and of all weights that were gathered to be written: at the worst moment of each phase."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.refs: list[weakref.ref] = []
        self.peaks: dict[str, int] = {}
        self.phase = "other"  # a check loads a reward model once more
        write = saving.write_file
        make: Any = nn.Parameter.__new__
        patch.setattr(nn.Parameter, "__new__", staticmethod(lambda *a, **k: self.noted(make(*a, **k))))
        patch.setattr(saving, "write_file", lambda path, state, end: write(path, self.all_noted(state), end))
        phases = {"opening": (ppo, "open_models"), "iterations": (trainer.PPOTrainer, "step")}
        phases |= {"saving": (best, "keep"), "end": (ppo, "_report")}
        for phase, (owner, name) in phases.items():
            patch.setattr(owner, name, self.during(phase, getattr(owner, name)))
        hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: self.note(module))
        self.remove = hook.remove

    def noted(self, tensor):
        self.refs.append(weakref.ref(tensor))
        self.measure()
        return tensor

    def all_noted(self, state):
        return {name: self.noted(tensor) for name, tensor in state.items()}

    def note(self, module):
        if isinstance(module, nn.Embedding):  # once a pass
            self.measure()

    def measure(self):
        self.refs = [ref for ref in self.refs if ref() is not None]
        alive = [x for ref in self.refs if (x := ref()) is not None and x.device.type != "meta"]
        sizes = {x.untyped_storage().data_ptr(): x.numel() * x.element_size() for x in alive}
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), sum(sizes.values()))

    def during(self, phase, run):
        def within(*given, **named):
            self.phase, before = phase, self.phase
            try:
                return run(*given, **named)
            finally:
                self.measure()
                self.phase = before

        return within


@contextmanager
def live_bytes():
    with pytest.MonkeyPatch.context() as patch:
        live = LiveBytes(patch)
        try:
            yield live
        finally:
            live.remove()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_end_needs_no_more_memory_for_weights_than_the_iterations(run, beside, make_stage, precision):
    config = beside(run(ALL_BUT_PPO), "--hardware.precision", precision, "--ppo.iterations", "1")
    with live_bytes() as live:
        make_stage(config, "ppo")
    model = sum(p.numel() for p in load_causal(config.folder / "sft/artifact").parameters())
    assert live.peaks["end"] <= live.peaks["iterations"], live.peaks
    assert live.peaks["saving"] <= live.peaks["iterations"] + 4 * model, live.peaks  # one beside them, in float32


class Arrivals(TorchDispatchMode):
    """Kinds of numbers that parameters have when they reach the device `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device.type == "meta" and out.ndim == 2:
            self.seen.add(out.dtype)
        return out


def test_weights_are_cast_before_they_reach_the_device(run, beside):
    config = beside(run(ALL_BUT_PPO), "--hardware.precision", "bf16")
    folder = config.folder / "sft/artifact"
    with Arrivals() as arrivals:
        open_sampler(config, folder, load_tokenizer(folder), torch.device("meta"))
    assert arrivals.seen == {torch.bfloat16}


@pytest.mark.parametrize("adapters", [False, True])
def test_the_resident_sampler_becomes_that_of_another_folder(run, lora_run, adapters):
    config = (lora_run if adapters else run)("sft")
    base, sft = config.folder / "base", config.folder / "sft/artifact"
    tokenizer, cpu = load_tokenizer(sft), torch.device("cpu")
    sampler = open_sampler(config, sft, tokenizer, cpu)
    for folder in (base, sft):
        again: Any = sampler_of(folder, sampler, config, tokenizer, cpu)
        expected = dict(load_causal(folder).named_parameters())
        assert again is sampler
        assert {n: p.tolist() for n, p in again.model.named_parameters()} == {
            n: p.tolist() for n, p in expected.items()
        }


def test_a_model_of_another_shape_gets_a_sampler_of_its_own_when_the_other_has_let_go(run, small_model):
    config = run("sft")
    folder = config.folder / "sft/artifact"
    tokenizer, cpu = load_tokenizer(folder), torch.device("cpu")
    sampler = InProcessSampler(small_model, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    another: Any = sampler_of(folder, sampler, config, tokenizer, cpu)
    assert another is not sampler and list(sampler.model.parameters()) == []
    assert sum(p.numel() for p in another.model.parameters()) == sum(
        p.numel() for p in load_causal(folder).parameters()
    )


@pytest.fixture
def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
