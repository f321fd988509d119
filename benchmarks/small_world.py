"""A world so small that all its responses can be enumerated: reward, KL and the best policy are sums, not samples.

A few prompts, all responses of a few letters with random scores, and a Llama of some thousand weights. PPO trains on it
with `PPOTrainer.step`; only tokenizer and reward model are replaced.

Names of shapes: Q prompts, N responses.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from reward_data.records import Message, Prompt
from rlhf.config import DataConfig, HardwareConfig, PPOConfig, RoleConfig, RunConfig
from rlhf.distributed.engine import LocalEngine
from rlhf.generation import InProcessSampler
from rlhf.models import ScalarModel
from rlhf.models.policy import PolicyModel
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.models import Models
from rlhf.ppo.setup import Setup, reward_set
from rlhf.ppo.trainer import PPOTrainer
from rlhf.runs.context import Progress, StageContext
from rlhf.tracking import NullTracker

PAD, EOS, BOS = 0, 1, 2
LETTERS = "abc"
VOCAB = 3 + len(LETTERS)
# Unequal lengths, so that there is padding. Not of one letter alone: attention over equal tokens is the same for any
# number of them, so with BOS in front "a" and "aa" are told apart, and without it no Llama could.
PROMPTS = ("ab", "cba")
MISSING_EOS_PENALTY = 1.0
HIDDEN = 16


class Figures(NamedTuple):
    reward: float  # expected, the penalty for a missing EOS inside
    kl: float  # nats per response, to the reference


class Letters:
    """A tokenizer of one token per letter; what the chat format writes around a prompt has none."""

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, PAD

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + LETTERS.index(letter) for letter in text if letter in LETTERS]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class World:
    """Prompts, all their responses of at most `length` tokens, what each is worth, and a reference policy.

    The reference earns 0 on average, so an error relative to the best reward is one relative to what can be gained.
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length = length
        self.prompts = [[BOS, *Letters()(prompt)["input_ids"]] for prompt in PROMPTS]
        self.answers = all_answers(length)
        self.reference = llama(seed)
        self.reference_QN = self.logprobs(self.reference)
        generator = torch.Generator().manual_seed(seed)
        self.scores_QN = torch.randn(len(self.prompts), len(self.answers), generator=generator)
        unfinished_N = torch.tensor([answer[-1] != EOS for answer in self.answers])
        rewards_QN = self.scores_QN.double() - MISSING_EOS_PENALTY * unfinished_N
        self.offset = float((self.reference_QN.exp() * rewards_QN).sum(1).mean())
        self.rewards_QN = rewards_QN - self.offset

    @torch.no_grad()
    def logprobs(self, causal: nn.Module) -> Tensor:
        """logprobs_QN, float64, of whole responses."""
        return self.token_logprobs(causal).sum(2)

    def token_logprobs(self, causal: nn.Module) -> Tensor:
        """logprobs_QNR, float64, by plain forward passes of transformers; 0 after the end of a response."""
        rows = []
        for prompt in self.prompts:
            filled = [answer + [PAD] * (self.length - len(answer)) for answer in self.answers]
            tokens_NT = torch.tensor([prompt + answer for answer in filled])
            lengths_N = torch.tensor([len(answer) for answer in self.answers])
            logprobs_NTV = torch.log_softmax(causal(tokens_NT).logits.double(), -1)[:, len(prompt) - 1 : -1]
            of_token_NR = logprobs_NTV.gather(2, tokens_NT[:, len(prompt) :, None])[:, :, 0]
            rows.append(torch.where(torch.arange(self.length) < lengths_N[:, None], of_token_NR, 0.0))
        return torch.stack(rows)

    def best(self, kl_coef: float) -> Tensor:
        """logprobs_QN of π_ref · exp(r / β) / Z, where E[r] - β KL(π‖π_ref) is largest (Korbak et al. 2022, eq. 5)."""
        return torch.log_softmax(self.reference_QN + self.rewards_QN / kl_coef, 1)

    def metrics(self, logprobs_QN: Tensor) -> Figures:
        """Expected reward and KL of a policy, mean over the prompts."""
        probs_QN = logprobs_QN.exp()
        reward = (probs_QN * self.rewards_QN).sum(1).mean()
        kl = (probs_QN * (logprobs_QN - self.reference_QN)).sum(1).mean()
        return Figures(float(reward), float(kl))

    def errors(self, reached: Figures, kl_coef: float) -> Figures:
        """How far a policy is from the best one, relative to it."""
        best = self.metrics(self.best(kl_coef))
        return Figures(reached.reward / best.reward - 1, reached.kl / best.kl - 1)


def all_answers(length: int) -> list[list[int]]:
    """Those that end in EOS after up to `length` tokens, and those that do not end. Pad and BOS are tokens like
    others."""
    others = [token for token in range(VOCAB) if token != EOS]
    ended = [[*head, EOS] for n in range(length) for head in itertools.product(others, repeat=n)]
    return ended + [list(answer) for answer in itertools.product(others, repeat=length)]


def llama(seed: int) -> LlamaForCausalLM:
    """Two layers; weights large enough for a reference with preferences of its own."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.15,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


class RewardTable(nn.Module):
    """A reward model with a table of the scores of all responses. NaN wherever no score may be read."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.scores = nn.Parameter(world.scores_QN.flatten())
        self.offset = world.offset
        known = [tuple(prompt + answer) for prompt in world.prompts for answer in world.answers]
        self.place = {tokens: number for number, tokens in enumerate(known)}

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor, response_length: int = 0) -> Tensor:
        """values_BT, like `rlhf.models.ScalarModel`."""
        rows = zip(tokens_BT, mask_BT.bool(), strict=True)
        place_B = torch.tensor([self.place[tuple(tokens[mask].tolist())] for tokens, mask in rows])
        last_B = (mask_BT * torch.arange(mask_BT.shape[1])).argmax(1)
        values_BT = torch.full(mask_BT.shape, torch.nan)
        values_BT[torch.arange(len(last_B)), last_B] = self.scores[place_B]
        return values_BT


class Trained(NamedTuple):
    path: list[Figures]  # before the first iteration and after every one
    policy: LlamaForCausalLM
    critic: ScalarModel | None


def train(world: World, ppo: PPOConfig, seed: int = 0) -> Trained:
    """Training from the reference, `ppo.iterations` long."""
    trainer = trainer_of(world, ppo, seed)
    policy, critic = cast(PolicyModel, trainer.models.policy.module), trainer.models.critic
    causal = cast(LlamaForCausalLM, policy.causal)
    path = [world.metrics(world.reference_QN)]
    while trainer.state.iteration < ppo.iterations:
        trainer.state.iteration += 1
        trainer.step()
        path.append(world.metrics(world.logprobs(causal)))
    return Trained(path, causal, None if critic is None else cast(ScalarModel, critic.module))


def trainer_of(world: World, ppo: PPOConfig, seed: int = 0) -> PPOTrainer:
    """One that has made no iteration yet."""
    config, models = world_config(ppo, seed), open_models(world, ppo)
    prompts = [Prompt((Message("user", text),), "helpful", "small world") for text in PROMPTS]
    return PPOTrainer.of(Setup(config, alone(), models, reward_set(config, models), prompts, held_out=[]))


def world_config(ppo: PPOConfig, seed: int) -> RunConfig:
    nothing = RoleConfig(train=[])
    data = DataConfig(demonstrations=nothing, preferences=nothing, prompts=nothing)
    return RunConfig(name="small-world", seed=seed, data=data, ppo=ppo)


def open_models(world: World, ppo: PPOConfig) -> Models:
    """What `rlhf.ppo.models.open_models` would load: the policy starts as the reference, a critic knows nothing."""
    steps = ppo.iterations * ppo.epochs * (ppo.batch_size // ppo.minibatch_size)
    hardware = HardwareConfig()
    return Models(
        policy=LocalEngine(PolicyModel(copy.deepcopy(world.reference)), ppo.optim, steps, hardware),
        reference=LocalEngine(PolicyModel(copy.deepcopy(world.reference)), None, steps, hardware),
        critic=LocalEngine(new_critic(), ppo.critic_optim, steps, hardware) if estimator_of(ppo).critic else None,
        reward_models={ppo.helpfulness_model: LocalEngine(RewardTable(world), None, steps, hardware)},
        sampler=InProcessSampler(copy.deepcopy(world.reference), [EOS], PAD),
        tokenizer=Letters(),
    )


def new_critic() -> ScalarModel:
    return ScalarModel(llama(seed=1).base_model, torch.zeros(1, HIDDEN))


def alone() -> StageContext:
    """One process that records nothing."""
    nowhere = Path()
    progress = Progress(nowhere, is_writer=False)
    return StageContext("ppo", 0, 1, torch.device("cpu"), nowhere, {}, NullTracker(), progress, local=True)
