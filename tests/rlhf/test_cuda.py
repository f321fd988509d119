"""On a GPU: a step under ZeRO-3 and NCCL, the sampler, and an iteration of PPO. Without one these tests are skipped.

The file is also the program of the rank: `test_cuda.py FOLDER`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.config import HardwareConfig, OptimConfig, PPOConfig, SamplingConfig
from rlhf.data.batches import PromptBatch, Rollout, select, to
from rlhf.distributed import engine as module
from rlhf.distributed.engine import Engine, open_engine
from rlhf.generation import InProcessSampler, cuda_graph
from rlhf.kernels import attention
from rlhf.kernels.norm import RMSNorm
from rlhf.models.policy import PolicyModel
from rlhf.ppo import step_profiler
from rlhf.runs.artifacts import Artifact
from rlhf.runs.context import Progress, StageContext
from rlhf.tracking import NullTracker
from tests.worker_group import leave, run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CUDA = torch.device("cuda", 0)
EOS, PAD, R, TEMPERATURE = 2, 0, 9, 0.7

# --- a step under ZeRO-3 and NCCL -----------------------------------------------------------------------------------

OPTIM, STEPS = OptimConfig(lr=1e-2), 5
BF16 = HardwareConfig(precision="bf16")


@pytest.fixture(scope="module")
def steps(make_llama, iteration, tmp_path_factory) -> dict[str, Any]:
    """What a rank found: device, backend, and of both engines the loss and the gradient norm of each step."""
    folder = tmp_path_factory.mktemp("rank")
    torch.save({"policy": PolicyModel(make_llama(0)), "rollout": iteration.rollout}, folder / "given.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cuda")
        run_ranks(__file__, folder, 1, timeout=170)
    return torch.load(folder / "found.pt")


@pytest.mark.integration
def test_a_rank_on_a_gpu_speaks_nccl(steps):
    assert (steps["device"], steps["backend"]) == ("cuda:0", "nccl")


@pytest.mark.integration
@pytest.mark.parametrize("figure", ["loss", "norm"])
def test_the_first_step_under_zero_on_a_gpu_is_that_of_one_process(steps, figure):
    zero, local = (steps[name][0][figure] for name in ("zero", "local"))
    assert zero == pytest.approx(local, rel=2e-2)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["zero", "local"])
def test_steps_on_a_gpu_lower_the_loss(steps, name):
    losses = [step["loss"] for step in steps[name]]
    assert losses[-1] < 0.9 * losses[0]


def learn(engine: Engine, rollout: Rollout) -> list[dict[str, float]]:
    """Steps on the answers as if they were demonstrations: the mean of -log p per token, and the gradient's norm."""
    part, found = to(rollout, engine.device), []
    count = float(part.response_mask_BR.sum())
    for _ in range(STEPS):
        with engine.steady():
            logprobs_BR, _ = engine(part.tokens_BT, part.mask_BT, R, TEMPERATURE)
            engine.backward(-logprobs_BR.sum(), count, last=True)
        found.append({"loss": -float(logprobs_BR.detach().sum()) / count, "norm": engine.step()})
    return found


def main(folder: Path) -> None:
    """The rank: the same steps by both engines."""
    module.import_deepspeed()
    given = torch.load(folder / "given.pt", weights_only=False)
    zero_config = module.zero_config

    def sharp(*arguments: Any) -> dict[str, Any]:
        config = zero_config(*arguments)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else weights this small stay whole
        return config

    module.zero_config = sharp
    found: dict[str, Any] = {"backend": torch.distributed.get_backend()}
    for name, local in (("zero", False), ("local", True)):
        engine = open_engine(copy.deepcopy(given["policy"]).to(CUDA), OPTIM, STEPS, BF16, local)
        found |= {name: learn(engine, given["rollout"]), "device": str(engine.device)}
    torch.save(found, folder / "found.pt")


# --- the sampler ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(make_llama, prompts, ppo_config):
    """sample(device, …) answers the prompts there; the answers come back to the CPU."""

    def sample(
        device: torch.device, precision: str = "float32", given: PromptBatch = prompts, **settings: Any
    ) -> Rollout:
        sampler = InProcessSampler(make_llama(0).to(device), [EOS], PAD, precision)
        settings_ = ppo_config.sampling.model_copy(update=settings)
        return to(sampler.sample(to(given, device), settings_, 0, 1), torch.device("cpu"))

    return sample


def test_a_gpu_gives_the_answers_of_a_cpu(sample):
    on_cuda, on_cpu = sample(CUDA), sample(torch.device("cpu"))
    assert on_cuda.tokens_BT.tolist() == on_cpu.tokens_BT.tolist()
    torch.testing.assert_close(on_cuda.behaviour_logprobs_BR, on_cpu.behaviour_logprobs_BR, atol=1e-4, rtol=0)


def test_a_gpu_reads_the_logprobs_that_a_cpu_sampled(sample, make_llama):
    rollout = sample(torch.device("cpu"))
    part = to(rollout, CUDA)
    with torch.no_grad():
        read_BR, _ = PolicyModel(make_llama(0)).to(CUDA)(part.tokens_BT, part.mask_BT, R, TEMPERATURE)
    torch.testing.assert_close(read_BR.cpu(), rollout.behaviour_logprobs_BR, atol=1e-3, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_sampler_on_a_gpu_reports_what_the_exact_model_reads(sample, make_llama, precision):
    rollout = sample(CUDA, precision)
    with torch.no_grad():
        read_BR, _ = PolicyModel(make_llama(0))(rollout.tokens_BT, rollout.mask_BT, R, TEMPERATURE)
    gap = (read_BR - rollout.behaviour_logprobs_BR)[rollout.response_mask_BR].abs().max()
    assert gap < (1e-4 if precision == "float32" else 0.1)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_on_a_gpu_the_number_of_rows_sampled_together_changes_no_answer(sample, batch_size):
    assert sample(CUDA, batch_size=batch_size).tokens_BT.tolist() == sample(CUDA).tokens_BT.tolist()


@pytest.mark.parametrize("slots", [5, 17])
def test_steps_that_are_replayed_give_the_answers_of_a_cpu(sample, prompts, slots, monkeypatch):
    """Long enough that the cache moves; rows come and go meanwhile."""
    recorded, record = [], cuda_graph.record
    monkeypatch.setattr(cuda_graph, "record", lambda *given: recorded.append(1) or record(*given))
    given = dataclasses.replace(select(prompts, torch.arange(24) % len(prompts.ids_B)), ids_B=torch.arange(24))
    on_cuda, on_cpu = (
        sample(device, given=given, batch_size=slots, max_new_tokens=50) for device in (CUDA, torch.device("cpu"))
    )
    assert on_cuda.tokens_BT.tolist() == on_cpu.tokens_BT.tolist()
    assert recorded


def test_on_a_gpu_rows_that_share_their_prompt_have_the_same_answers_alone(sample, prompts):
    given = dataclasses.replace(select(prompts, [0, 1, 2] * 3), ids_B=torch.arange(9))
    together = sample(CUDA, given=given).tokens_BT
    apart = [sample(CUDA, given=select(given, [row])).tokens_BT[0].tolist() for row in range(9)]
    assert together.tolist() == apart


# --- packed rows ----------------------------------------------------------------------------------------------------


def test_packed_rows_on_a_gpu_are_read_by_flash_attention_as_rows_of_their_own(make_llama, iteration, monkeypatch):
    """In bf16, two query heads to a key head, with the gradients. Both ways round every product, 2^-9; a row that saw
    another would be off by as much as itself."""
    asked, real = [], attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *given, **more: asked.append(1) or real(*given, **more))
    config = copy.deepcopy(make_llama(0).config)
    config.num_key_value_heads = 1
    torch.manual_seed(0)
    model, part, found = LlamaForCausalLM(config).eval(), to(iteration.rollout, CUDA), []
    for packing in (False, True):
        policy = PolicyModel(copy.deepcopy(model), packing).to(CUDA)
        with torch.autocast("cuda", torch.bfloat16):
            logprobs_BR, _ = policy(part.tokens_BT, part.mask_BT, R, TEMPERATURE)
        logprobs_BR[part.response_mask_BR].sum().backward()
        gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        found.append((logprobs_BR.detach()[part.response_mask_BR], torch.cat(gradients)))
    assert len(asked) == config.num_hidden_layers
    for padded, packed in zip(*found, strict=True):
        assert (packed - padded).norm() < 0.03 * padded.norm()


@pytest.mark.parametrize("rows_of_prompt", [1, 2])
def test_a_gpu_reads_packed_rows_as_a_cpu_does_also_where_they_share_their_prompt(
    make_llama, iteration, rows_of_prompt
):
    given = select(iteration.rollout, torch.arange(3).repeat_interleave(rows_of_prompt))
    read = []
    for device in (CUDA, torch.device("cpu")):
        part, policy = to(given, device), PolicyModel(make_llama(0), packing=True).to(device)
        with torch.no_grad():
            read.append(policy(part.tokens_BT, part.mask_BT, R, TEMPERATURE)[0].cpu()[given.response_mask_BR])
    torch.testing.assert_close(*read, atol=1e-3, rtol=0)


def test_a_norm_on_a_gpu_is_that_of_transformers():
    """Rounded to bf16 once, as a reader of transformers' norm would; float32 sums differ in their order. Some rows are so
    small that eps counts."""
    ours, theirs = RMSNorm(64, 1e-5).to(CUDA), LlamaRMSNorm(64, 1e-5).to(CUDA)
    size_51 = torch.logspace(-3, 1, 5, device=CUDA)[:, None]
    x, grad = torch.randn(5, 64, device=CUDA) * size_51, torch.randn(5, 64, device=CUDA).bfloat16()
    found = []
    for norm in (ours, theirs):
        norm.weight.data = torch.linspace(0.2, 2, 64, device=CUDA)
        given = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = norm(given)
            assert (y.dtype is torch.bfloat16) == (norm is ours)
            y = y.to(torch.bfloat16)
        found.append((y.detach().float(), *torch.autograd.grad(y, [given, norm.weight], grad)))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=2**-7, atol=1e-5 * float(other.abs().max()))


# --- an iteration of PPO --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def iterate(tmp_path_factory):
    """iterate(precision, …) → all figures of the first iteration of a tiny Llama, as PPOTrainer makes them."""
    from benchmarks.shapes import random_model
    from benchmarks.turns import settings
    from rlhf.data import load_prompts, short_prompts
    from rlhf.ppo.models import open_models
    from rlhf.ppo.setup import Setup, reward_set
    from rlhf.ppo.trainer import PPOTrainer

    folder = tmp_path_factory.mktemp("ppo")
    path = random_model("tiny", folder / "base")
    artifact = Artifact("model", path, "", {}, "", "", {})
    context = StageContext(
        stage="ppo",
        rank=0,
        world_size=1,
        device=CUDA,
        folder=folder,
        inputs={"sft": artifact, "reward/reward": artifact},
        tracker=NullTracker(),
        progress=Progress(folder, is_writer=False),
        local=True,
    )
    ppo = PPOConfig(
        batch_size=8,
        minibatch_size=8,
        micro_batch_size=4,
        max_prompt_length=64,
        sampling=SamplingConfig(max_new_tokens=R, batch_size=4),
        logged_samples=1,
    )

    def iterate(precision: str, **changed: Any) -> dict[str, float]:
        config = settings(Namespace(precision=precision), path, folder, 64, ppo=ppo.model_copy(update=changed))
        models = open_models(config, context, {"reward": path})
        prompts = short_prompts(models.tokenizer, load_prompts(config).train, ppo.max_prompt_length)
        trainer = PPOTrainer.of(Setup(config, context, models, reward_set(config, models), prompts, []))
        trainer.state.iteration = 1
        metrics = trainer.step()
        return metrics | step_profiler.close(trainer.timer, metrics, trainer.machine)

    return iterate


@pytest.fixture(scope="module", params=["float32", "bf16"])
def metrics(request, iterate) -> dict[str, float]:
    return iterate(request.param)


@pytest.mark.integration
def test_all_figures_of_an_iteration_on_a_gpu_are_finite(metrics):
    assert [name for name, value in metrics.items() if not math.isfinite(value)] == []


@pytest.mark.integration
@pytest.mark.parametrize("phase", step_profiler.COMPUTING)
def test_a_phase_on_a_gpu_tells_its_memory_and_its_share_of_the_limit(metrics, phase):
    assert metrics[f"perf/memory_{phase}"] > 0
    assert 0 < metrics[f"perf/mfu_{phase}"] < 1


@pytest.mark.integration
def test_on_a_gpu_the_first_update_starts_from_a_ratio_of_one(metrics):
    assert metrics["ppo/approx_kl"] < 1e-4
    assert metrics["ppo/clip_fraction"] == 0
    assert metrics["ppo/grad_norm"] > 0 and metrics["ppo/critic_grad_norm"] > 0


@pytest.mark.integration
def test_on_a_gpu_sampling_beside_the_update_changes_no_figure_of_this_iteration(iterate):
    """The two have streams of their own."""
    sampling = SamplingConfig(max_new_tokens=R, batch_size=4, one_step_off_policy=True)
    in_turn, beside = iterate("float32"), iterate("float32", sampling=sampling)
    told = [name for name in in_turn if name.startswith("ppo/")]
    assert {name: beside[name] for name in told} == pytest.approx({name: in_turn[name] for name in told}, abs=1e-4)
    assert beside["perf/overlapped_seconds_sampling"] > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
