"""TRL's numbers (tests/golden/trl_ppo.*), and our functions on the same weights and responses."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.algorithms.kl import k1
from rlhf.algorithms.reward_shaping import token_rewards
from rlhf.config import HardwareConfig, OptimConfig, PPOConfig, SamplingConfig
from rlhf.data.batches import Rollout, select
from rlhf.distributed.engine import LocalEngine
from rlhf.models import ScalarModel
from rlhf.models.policy import PolicyModel
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.experience import make_experience
from rlhf.ppo.scoring import score_rollout
from rlhf.ppo.update import update
from rlhf.rewards import ModelReward, Responses, RewardSet, weighted_sum

FILE = Path(__file__).parents[1] / "golden" / "trl_ppo.json"
GOLDEN = json.loads(FILE.read_text())
TENSORS = load_file(FILE.with_suffix(".safetensors"))
SETTINGS = GOLDEN["settings"]
TOLERANCE = 1e-5
AGREEING = ["full", "ragged"]


def assert_near(quantity, ours, trls, tolerance=TOLERANCE):
    ours, trls = torch.as_tensor(ours), torch.as_tensor(trls)
    assert ours.shape == trls.shape
    difference = float((ours - trls).abs().max())
    print(f"{quantity:32} {difference:.1e}")
    assert difference <= tolerance, f"{quantity}: {difference:.1e}"


# --- the same weights, the same answers -----------------------------------------------------------------------------


def weights(model):
    start = f"weights/{model}/"
    return {name.removeprefix(start): tensor.clone() for name, tensor in TENSORS.items() if name.startswith(start)}


def causal(model, state=None):
    llama = LlamaForCausalLM(LlamaConfig(**GOLDEN["shape"])).eval()
    llama.load_state_dict(state or weights(model))
    return llama


def scalar(model):
    state = weights(model)
    head_1H = state.pop("score.weight")
    untrained = LlamaForCausalLM(LlamaConfig(**GOLDEN["shape"]))
    return ScalarModel(causal(model, state | {"lm_head.weight": untrained.lm_head.weight}).base_model, head_1H)


class RecordingEngine(LocalEngine):
    """Keeps the gradients of its last step by TRL's names."""

    def step(self):
        names = ("causal.", ""), ("backbone.", "model."), ("head.weight", "score.weight")
        self.gradients = {}
        for name, parameter in self.module.named_parameters():
            for ours, trls in names:
                name = trls + name.removeprefix(ours) if name.startswith(ours) else name
            assert parameter.grad is not None
            self.gradients[name] = parameter.grad.clone()
        return super().step()


def engine(module, optim=None):
    return RecordingEngine(module, optim, 1, HardwareConfig())


@functools.cache
def case(name):
    """What TRL recorded (`trl`), and what our functions make of the same rollout."""
    made = GOLDEN["cases"][name]
    trl = SimpleNamespace(**{key: torch.tensor(value) for key, value in made["iteration"].items()})
    trl.micro_batches = [{key: torch.tensor(value) for key, value in part.items()} for part in made["micro_batches"]]
    trl.metrics = {key: torch.tensor(value) for key, value in made["figures"].items()}
    start = f"gradients/{name}/"
    trl.gradients = {key.removeprefix(start): TENSORS[key] for key in TENSORS if key.startswith(start)}
    settings = made["settings"]
    config = PPOConfig(
        batch_size=8,
        minibatch_size=8,
        micro_batch_size=8,
        sampling=SamplingConfig(temperature=SETTINGS["temperature"]),
        kl_coef=SETTINGS["kl_coef"],
        gamma=settings["gamma"],
        gae_lambda=settings["lam"],
        clip_range=SETTINGS["cliprange"],
        value_clip_range=SETTINGS["cliprange_value"],
        whiten_rewards=settings.get("whiten_rewards", False),
        missing_eos_penalty=SETTINGS["missing_eos_penalty"],
        optim=OptimConfig(lr=0.0),
        critic_optim=OptimConfig(lr=0.0),
    )
    rollout = rollout_of(trl)
    reward = ModelReward(engine(scalar("reward")), config)
    models: Any = SimpleNamespace(
        policy=engine(PolicyModel(causal("policy"))),
        reference=engine(PolicyModel(causal("reference"))),
        critic=engine(scalar("value")),
    )
    rewards = RewardSet({"reward": reward}, weighted_sum([1.0]))
    scores = score_rollout(rollout, models, rewards(Responses(rollout, prompts=[], texts=[])), config)
    combined = rewards.combine(scores.rewards_BN, scores.failed_BN, torch.zeros(8).bool())
    experience, metrics = make_experience(rollout, scores, combined, estimator_of(config), config, config.kl_coef)
    score_B = combined.score_B
    return SimpleNamespace(
        trl=trl, config=config, rollout=rollout, scores=scores, score_B=score_B, experience=experience, **metrics
    )


def rollout_of(trl):
    """TRL's answers as ours: masks from the lengths of prompt and answer, an answer ends with its first EOS."""
    P, tokens_BT = int(trl.context_length), trl.query_responses
    answers = [row.tolist() for row in tokens_BT[:, P:]]
    finished = [GOLDEN["eos"] in answer for answer in answers]
    lengths = [a.index(GOLDEN["eos"]) + 1 if ended else len(a) for a, ended in zip(answers, finished, strict=True)]
    response_mask_BR = torch.arange(tokens_BT.shape[1] - P) < torch.tensor(lengths)[:, None]
    return Rollout(
        tokens_BT=tokens_BT,
        mask_BT=torch.cat([tokens_BT[:, :P] != GOLDEN["pad"], response_mask_BR], 1),
        response_mask_BR=response_mask_BR,
        behaviour_logprobs_BR=trl.logprobs,
        finished_B=torch.tensor(finished),
    )


def updated(given, index=slice(None)):
    """Figures and gradients of our update over some rows, whitened with TRL's variance, from the moved weights."""
    experience = select(given.experience, index)
    experience = dataclasses.replace(experience, advantages_BR=bessel(given) * experience.advantages_BR)
    config = given.config.model_copy(update={"minibatch_size": 8, "micro_batch_size": 8})
    policy = engine(PolicyModel(causal("policy_moved")), config.optim)
    critic = engine(scalar("value_moved"), config.critic_optim)
    metrics = update(policy, critic, experience, config, (0, 1), kl_loss_coef=0.0)
    return SimpleNamespace(metrics=metrics, policy=policy.gradients, critic=critic.gradients)


def bessel(given):
    """TRL divides the variance by n - 1, so its whitened advantages are smaller by √((n - 1)/n)."""
    n = int(given.rollout.response_mask_BR.sum())
    return math.sqrt((n - 1) / n)


def in_rollout_order(micro_batch, key):
    """TRL shuffles the rows of an update."""
    return micro_batch[key][micro_batch["micro_batch_inds"].argsort()]


def our_token_rewards(given):
    kl_BR = k1(given.scores.logprobs_BR, given.scores.ref_logprobs_BR)
    final_B = given.score_B - SETTINGS["missing_eos_penalty"] * (~given.rollout.finished_B).float()
    return token_rewards(final_B, kl_BR, given.config.kl_coef, given.rollout.response_mask_BR)


def assert_same_gradients(quantity, ours, trls):
    assert ours.keys() == trls.keys()
    flat, expected = (torch.cat([side[key].flatten() for key in sorted(ours)]) for side in (ours, trls))
    assert_near(quantity, flat, expected)
    assert_near(f"{quantity}, norm", flat.norm(), expected.norm())
    assert expected.norm() > 0.01


def trls_gradients(given, model):
    start = f"{model}/"
    gradients = given.trl.gradients
    return {name.removeprefix(start): gradients[name] for name in gradients if name.startswith(start)}
