"""For notebooks, besides `PPOTrainer`: a reward model that scores, and a policy that generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from reward_data import Message, Prompt
from rlhf.chat import format_of
from rlhf.config import RunConfig, SamplingConfig
from rlhf.data import pad, prompt_batch
from rlhf.data.batches import to
from rlhf.distributed.engine import LocalEngine, prepare_environment
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler
from rlhf.models import ScalarModel, find_model, load_causal, load_reward_scalar, load_tokenizer
from rlhf.rewards import ModelReward, Responses, Reward, Scored, responses_of

Conversation = str | Sequence[dict[str, str] | Message]
"""The text of a user, or messages [{"role": …, "content": …}, …] that end with the user's."""


GREEDY = 1e-6
"""The temperature that stands for 0: the most likely token has all the probability."""


class RewardModel:
    """A reward model in this process: `RewardModel.load(path).score(prompts, responses)`."""

    def __init__(self, model: ScalarModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a folder or a hub name: an artifact of this project, a PEFT adapter, or a classifier with one label.

        UserError (4) for anything else.
        """
        prepare_environment()
        folder = find_model(path)
        return cls(load_reward_scalar(folder).to(_device()), load_tokenizer(folder))

    @torch.no_grad()
    def score(self, prompts: Sequence[Conversation], responses: Sequence[str], batch_size: int = 8) -> list[float]:
        """A score for each response: the model's logit minus its mean over SFT responses."""
        if len(prompts) != len(responses):
            raise UserError(f"{len(prompts)} prompts, but {len(responses)} responses")
        chat = format_of(self.tokenizer)
        rows = [
            chat.encode_response(messages_of(prompt), response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        scores: list[float] = []
        for start in range(0, len(rows), batch_size):
            tokens_BT, mask_BT = pad(rows[start : start + batch_size], self.tokenizer.pad_token_id)
            device = self.model.head.weight.device
            scores += self.model.score(tokens_BT.to(device), mask_BT.to(device)).tolist()
        return scores

    def as_reward(self, config: RunConfig, tokenizer: Any) -> Reward:
        """As a reward of `PPOTrainer`: it reads the policy's tokens where the policy's `tokenizer` makes the same ones, and
        else the texts."""
        if not _same_tokens(self.tokenizer, tokenizer):
            return self._score_texts
        self.model.packing = config.ppo.packing
        return ModelReward(LocalEngine(self.model, None, 1, config.hardware), config.ppo)

    def _score_texts(self, responses: Responses) -> Scored:
        values = self.score([prompt.messages for prompt in responses.prompts], responses.texts)
        return Scored(torch.tensor(values), torch.zeros(len(values), dtype=torch.bool))


class Policy:
    """A language model in this process: `load_policy(path).generate(prompts)`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat = format_of(tokenizer)
        self.sampler = InProcessSampler(model, self.chat.stop_ids, tokenizer.pad_token_id, device=_device())

    def generate(
        self, prompts: Sequence[Conversation], max_new_tokens: int = 256, temperature: float = 1.0, seed: int = 0
    ) -> list[str]:
        """A response to each prompt; at a temperature of 0 the most likely tokens.

        A prompt gets the same response with the same seed, whatever stands beside it; where it stands there again it gets
        another one.
        """
        rows = [Prompt(messages_of(prompt), "helpful", f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        said = [row.messages for row in rows]
        times = [said[:i].count(messages) for i, messages in enumerate(said)]
        batch = to(prompt_batch(self.tokenizer, rows, times, 1 << 30), _device())
        settings = SamplingConfig(temperature=temperature or GREEDY, max_new_tokens=max_new_tokens)
        rollout = self.sampler.sample(batch, settings, seed, iteration=0)
        return [*responses_of(rollout, rows, self.tokenizer).texts]


def load_policy(path: str | Path) -> Policy:
    """The model in a folder or on the hub, which may be an adapter. UserError (4) if there is none."""
    prepare_environment()
    folder = find_model(path)
    return Policy(load_causal(folder), load_tokenizer(folder))


def messages_of(prompt: Conversation) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in prompt)  # type: ignore[arg-type]


def _same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same ids of a conversation."""
    ours, theirs = format_of(one), format_of(other)
    return (
        one.get_vocab() == other.get_vocab()
        and (one.chat_template, ours.name, ours.stop_ids) == (other.chat_template, theirs.name, theirs.stop_ids)
        and one.pad_token_id == other.pad_token_id
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
