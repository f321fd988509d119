"""Our GRPO and Dr. GRPO against TRL's GRPOTrainer, which runs here: two optimizer steps on one batch.

TRL gets its responses dictated and keeps all else: tokens of prompts, padding, rewards, groups, logprobs, loss, AdamW.
The policy that both begin with lies away from the reference, and the second step away from the policy that sampled, so
KL, ratios and clipping are not trivial. Everything is float32; `pytest -s` prints the largest difference of each quantity.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlhf.config import HardwareConfig, OptimConfig, PPOConfig, SamplingConfig, TinyConfig
from rlhf.data.batches import Rollout
from rlhf.distributed.engine import LocalEngine
from rlhf.models import load_causal, load_tokenizer, save_causal
from rlhf.models.policy import PolicyModel
from rlhf.models.tiny import train_tokenizer, untrained_llama
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.experience import make_experience
from rlhf.ppo.scoring import score_rollout
from rlhf.ppo.update import update
from rlhf.rewards import weighted_sum

SHAPE = TinyConfig(vocab_size=280, hidden_size=16, intermediate_size=24, layers=2, heads=2)
PROMPTS = ["how", "how are you", "are you how are you"]
GROUP, LONGEST, BETA, TEMPERATURE, LR = 4, 6, 0.3, 0.7, 0.02
TOLERANCE = 1e-5
KINDS = {"grpo": "group", "dr_grpo": "none"}  # TRL's scale_rewards


def assert_near(quantity: str, ours: Any, trls: Any, tolerance: float = TOLERANCE) -> None:
    ours, trls = torch.as_tensor(ours), torch.as_tensor(trls)
    assert ours.shape == trls.shape
    difference = float((ours - trls).abs().max())
    print(f"{quantity:32} {difference:.1e}")
    assert difference <= tolerance, f"{quantity}: {difference:.1e}"


# --- theirs -----------------------------------------------------------------------------------------------------------


@functools.cache
def folder_of_model() -> Path:
    """A small Llama with opinions, whose weights are the reference's."""
    folder = Path(tempfile.mkdtemp())
    tokenizer = train_tokenizer(["how are you"] * 9, SHAPE.vocab_size)
    llama = untrained_llama(SHAPE, tokenizer, seed=0)
    torch.manual_seed(0)
    for parameter in llama.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    save_causal(llama, folder, tokenizer)
    return folder


def move(model: torch.nn.Module) -> None:
    """The policy that both sides begin with."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def answers(eos_id: int) -> list[list[int]]:
    """Of one to six tokens, group by group; two fill their slots without an end."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 6, 4, 6, 3, 3, 5, 2, 6, 1, 4]
    rows = [torch.randint(10, 270, (length,), generator=generator).tolist() for length in lengths]
    return [row if i in (2, 9) else [*row[:-1], eos_id] for i, row in enumerate(rows)]


def scores(failing: bool) -> list[float | None]:
    """Of groups apart from one another; those of the last group lie near each other."""
    given: list[float | None] = [1.0, -0.5, 2.0, 0.25, 7.0, 9.0, 8.5, 7.5, 0.1, 0.11, 0.1, 0.12]
    return [None if failing and i in (1, 6) else score for i, score in enumerate(given)]


class Dictated(GRPOTrainer):
    """With responses that are given, and a record of what is made of them."""

    processing_class: Any
    losses: list[float]
    batch: SimpleNamespace

    def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
        return answers(self.processing_class.eos_token_id), None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        self.batch = SimpleNamespace(**{key: value.clone() for key, value in batch.items()})
        return batch

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        self.losses.append(float(loss.detach()))
        return loss


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in given["model"].named_parameters()})


@functools.cache
def trl(kind: str, failing: bool = False, corrected_kl: bool = False) -> SimpleNamespace:
    folder, gradients, rows = folder_of_model(), Gradients(), len(PROMPTS) * GROUP
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type=kind,
        scale_rewards=KINDS[kind],
        beta=BETA,
        use_bias_correction_kl=corrected_kl,
        temperature=TEMPERATURE,
        epsilon=0.2,
        num_generations=GROUP,
        num_iterations=2,
        max_completion_length=LONGEST,
        per_device_train_batch_size=rows,
        shuffle_dataset=False,
        max_steps=2,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        max_grad_norm=1e9,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Dictated(
        model=str(folder),
        reward_funcs=lambda **_: scores(failing),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=load_tokenizer(folder),
        callbacks=[gradients],
    )
    model: Any = trainer.model
    trainer.losses = []
    move(model)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return SimpleNamespace(batch=trainer.batch, losses=trainer.losses, gradients=gradients.steps, weights=weights)


# --- ours -------------------------------------------------------------------------------------------------------------


@functools.cache
def ours(kind: str, failing: bool = False) -> SimpleNamespace:
    """Scoring, experience and update of the rows that TRL made."""
    batch, folder = trl(kind, failing).batch, folder_of_model()
    optim = OptimConfig(lr=LR, weight_decay=0.0, beta2=0.95, eps=1e-5, max_grad_norm=1e9)
    rows = len(PROMPTS) * GROUP
    config = PPOConfig(
        advantage=kind,
        group_size=GROUP,
        batch_size=rows,
        minibatch_size=rows,
        micro_batch_size=4,
        epochs=2,
        sampling=SamplingConfig(temperature=TEMPERATURE, max_new_tokens=LONGEST),
        kl_coef=BETA,
        missing_eos_penalty=0.0,
        optim=optim,
    )
    causal = load_causal(folder)
    move(causal)
    policy = LocalEngine(PolicyModel(causal), optim, 2, HardwareConfig())
    reference = LocalEngine(PolicyModel(load_causal(folder)), None, 2, HardwareConfig())
    rollout = rollout_of(batch, load_tokenizer(folder).eos_token_id)
    given, models = scores(failing), SimpleNamespace(policy=policy, reference=reference, critic=None)
    rewards_B1 = torch.tensor([[score or 0.0] for score in given])
    failed_B1 = torch.tensor([[score is None] for score in given])
    scored = score_rollout(rollout, models, (rewards_B1, failed_B1), config)  # type: ignore[arg-type]
    combined = weighted_sum([1.0])(rewards_B1, failed_B1, torch.zeros(rows, dtype=torch.bool))
    experience, _ = make_experience(rollout, scored, combined, estimator_of(config), config, BETA)
    gradients = watched(policy)
    metrics = update(policy, None, experience, config, (0, 1), BETA)
    weights = {name.removeprefix("causal."): p.detach() for name, p in policy.module.named_parameters()}
    return SimpleNamespace(
        rollout=rollout, scores=scored, experience=experience, metrics=metrics, gradients=gradients, weights=weights
    )


def rollout_of(batch: SimpleNamespace, eos_id: int) -> Rollout:
    mask_BR = batch.completion_mask.bool()
    return Rollout(
        tokens_BT=torch.cat([batch.prompt_ids, batch.completion_ids], 1),
        mask_BT=torch.cat([batch.prompt_mask.bool(), mask_BR], 1),
        response_mask_BR=mask_BR,
        behaviour_logprobs_BR=batch.old_per_token_logps,
        finished_B=((batch.completion_ids == eos_id) & mask_BR).any(1),
    )


def watched(engine: LocalEngine) -> list[dict[str, Tensor]]:
    """The gradient of each step, by TRL's names."""
    steps: list[dict[str, Tensor]] = []
    step = engine.step

    def noted() -> float:
        named = engine.module.named_parameters()
        steps.append({name.removeprefix("causal."): p.grad.clone() for name, p in named if p.grad is not None})
        return step()

    engine.step = noted  # type: ignore[method-assign]
    return steps


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


# --- where both mean the same ---------------------------------------------------------------------------------------


def test_the_batch_has_groups_of_unequal_lengths():
    batch = trl("grpo").batch
    assert batch.completion_mask.sum(1).tolist() == [len(answer) for answer in answers(0)]
    assert len(batch.prompt_mask.sum(1).unique()) == len(PROMPTS)
    prompts = batch.prompt_ids.view(len(PROMPTS), GROUP, -1)
    assert (prompts == prompts[:, :1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_of_policy_and_reference(kind):
    own, batch = ours(kind), trl(kind).batch
    mask_BR = own.rollout.response_mask_BR
    assert_near(f"{kind} logprobs", own.scores.logprobs_BR[mask_BR], batch.old_per_token_logps[mask_BR])
    assert_near(f"{kind} ref logprobs", own.scores.ref_logprobs_BR[mask_BR], batch.ref_per_token_logps[mask_BR])
    assert (batch.old_per_token_logps - batch.ref_per_token_logps)[mask_BR].abs().max() > 0.1


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_advantages_and_those_of_groups_with_a_failed_score(kind, failing):
    own, theirs_B = ours(kind, failing), trl(kind, failing).batch.advantages
    mask_BR = own.rollout.response_mask_BR
    assert_near(f"{kind} advantages", own.experience.advantages_BR, torch.where(mask_BR, theirs_B[:, None], 0.0))
    assert theirs_B.abs().max() > 1
    assert own.experience.counted_B.tolist() == [not failing or i not in (1, 6) for i in range(12)]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_two_steps(kind):
    """TRL's holds the KL; the mean over both steps is what we report."""
    metrics, losses = ours(kind).metrics, trl(kind).losses
    total = metrics["ppo/policy_loss"] + BETA * metrics["ppo/kl_loss"]
    assert_near(f"{kind} loss", total, sum(losses) / 2)
    assert abs(losses[0] - losses[1]) > 1e-2 and metrics["ppo/clip_fraction"] > 0.1 and metrics["ppo/kl_loss"] > 1e-2


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_step(kind, step):
    own, theirs = ours(kind).gradients[step], trl(kind).gradients[step]
    assert own.keys() == theirs.keys()
    assert_near(f"{kind} gradient {step}", flat(own), flat(theirs))
    assert flat(theirs).norm() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_after_two_steps(kind):
    own, theirs = ours(kind).weights, trl(kind).weights
    assert own.keys() == theirs.keys()
    # Steps are as long as LR; where a gradient is nearly 0, Adam divides rounding by rounding.
    assert_near(f"{kind} weights", flat(own), flat(theirs), tolerance=LR / 100)


# --- where we differ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_trl_keeps_a_failed_row_in_kl_and_mean_and_we_leave_it_out(kind):
    """Its KL still moves TRL's policy; ours moves as if the row had not been sampled."""
    own, theirs, batch = ours(kind, True), trl(kind, True), trl(kind, True).batch
    mask_BR, counted_B = own.rollout.response_mask_BR, own.experience.counted_B
    gap_BR = batch.ref_per_token_logps - batch.old_per_token_logps
    loss_BR = BETA * (gap_BR.exp() - gap_BR - 1) - batch.advantages[:, None]
    sum_B = torch.where(mask_BR, loss_BR, 0.0).sum(1)
    row_B = sum_B / (mask_BR.sum(1) if kind == "grpo" else LONGEST)
    assert_near(f"{kind} TRL's first loss", row_B.mean(), theirs.losses[0])
    assert abs(float(row_B[counted_B].mean()) - theirs.losses[0]) > 1e-3
    first = own.experience
    weight_BR = first.weight_BR * loss_BR
    assert_near(f"{kind} our first loss", weight_BR.sum() / first.denominator_B.sum(), row_B[counted_B].mean())


@pytest.mark.parametrize("kind", KINDS)
def test_trl_multiplies_the_kl_by_the_ratio_unless_told_not_to_and_we_do_not(kind):
    """`use_bias_correction_kl`, of DeepSeek-V3.2: the loss of the first step is the same, its gradient is another one."""
    plain, corrected = trl(kind), trl(kind, corrected_kl=True)
    assert corrected.losses[0] == plain.losses[0]
    assert (flat(corrected.gradients[0]) - flat(ours(kind).gradients[0])).norm() > 0.1 * flat(plain.gradients[0]).norm()
