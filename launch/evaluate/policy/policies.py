"""Where responses come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reward_data import Prompt
from rlhf.chat import format_of
from rlhf.config import SamplingConfig
from rlhf.data import EncodedPrompt, prompt_batch
from rlhf.data.batches import to
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler
from rlhf.models import load_causal, load_tokenizer, positions
from rlhf.rewards import responses_of

ITERATION = 1 << 41  # of the random numbers: training and its evaluations use others


@dataclass(frozen=True)
class Settings:
    samples: int = 1
    """Responses to each prompt."""
    temperature: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 64
    """Responses sampled, and texts scored, at once."""
    precision: str = "float32"
    seed: int = 0
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of prompts that a policy cannot hold."""


@dataclass(frozen=True)
class Response:
    text: str
    length: int  # tokens, EOS included
    finished: bool  # ended with EOS, not by the limit of tokens
    tokens: list[int]
    logprob: float  # nats, at the sampling temperature


class ModelPolicy:
    """A causal model in a folder: ours or another one with a chat template of its own."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.tokenizer, self._settings = load_tokenizer(folder), settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        causal: Any = load_causal(folder)
        self._limit = positions(causal.config)
        ends = format_of(self.tokenizer).stop_ids, self.tokenizer.pad_token_id
        self._sampler = InProcessSampler(causal, *ends, settings.precision, self._device)

    def encode(self, prompts: Sequence[Prompt]) -> tuple[list[EncodedPrompt | None], list[str]]:
        """The prompts with their tokens, None for those that the chat format or the model cannot hold, and why."""
        chat, found, unfit = format_of(self.tokenizer), [], []
        for prompt in prompts:
            try:
                tokens = chat.encode_prompt(prompt.messages)
                needed = len(tokens) + self._settings.max_new_tokens
                if self._limit is not None and needed > self._limit:
                    raise UserError(f"prompt and response may need {needed} tokens, and the model has {self._limit}", 3)
                found.append(EncodedPrompt(**vars(prompt), tokens=tokens))
            except UserError as error:
                found.append(None)
                unfit.append(f"{prompt.source}: {error.message}")
        return found, unfit

    def respond(
        self, prompts: Sequence[EncodedPrompt], ids: Sequence[int], advance: Callable[[int], object]
    ) -> list[Response]:
        """A response to each prompt. The random numbers of a response depend on its id alone, so policies that are
        compared use the same ones.
        """
        settings, found = self._settings, []
        sampling = SamplingConfig(
            temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size
        )
        window = 4 * settings.batch_size  # continuous batching is slow at the end of each
        for start in range(0, len(prompts), window):
            part = prompts[start : start + window]
            longest = max(len(prompt.tokens) for prompt in part)
            batch = to(prompt_batch(self.tokenizer, part, ids[start : start + window], longest), self._device)
            rollout = self._sampler.sample(batch, sampling, settings.seed, ITERATION)
            texts = responses_of(rollout, part, self.tokenizer).texts
            tokens_BR = rollout.tokens_BT[:, -rollout.response_mask_BR.shape[1] :].tolist()
            logprobs = torch.where(rollout.response_mask_BR, rollout.behaviour_logprobs_BR, 0.0).sum(1).tolist()
            lengths, finished = rollout.response_mask_BR.sum(1).tolist(), rollout.finished_B.tolist()
            rows = zip(texts, lengths, finished, tokens_BR, logprobs, strict=True)
            found += [Response(text, n, done, tokens[:n], logprob) for text, n, done, tokens, logprob in rows]
            advance(len(part))
        return found

    def close(self) -> None:
        self._sampler.close()
