"""Where responses come from: model folders and endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from launch.evaluate.policy.endpoint import PREFIX, Endpoint, Failure
from launch.model_folder import model_folder
from reward_data import Prompt
from rlhf.chat import format_of
from rlhf.config import SamplingConfig
from rlhf.data import EncodedPrompt, prompt_batch
from rlhf.data.batches import to
from rlhf.errors import UserError
from rlhf.evaluation.refusals import PATTERN
from rlhf.generation import InProcessSampler
from rlhf.models import load_causal, load_tokenizer, positions
from rlhf.rewards import responses_of

SEEDS, SEEDS_APART = 2**31, 1_000_003  # of an endpoint: what all take, and how far those of two runs lie apart
ITERATION = 1 << 41  # of the random numbers: training and its evaluations use others


Advance = Callable[[int], object]


@dataclass(frozen=True)
class Settings:
    samples: int = 1
    """Responses to each prompt."""
    temperature: float = 1.0
    more_temperatures: tuple[float, ...] = ()
    """Others at which the policies respond too; pairs are compared at `temperature`."""
    reference: str | None = None
    """A model with the tokenizer of the policies, from which their KL is measured."""
    refusal: str = PATTERN
    """A pattern that the beginning of a refusal has, or `module:function` of the responses."""
    judge: str | None = None
    """MODEL@URL: an endpoint that compares the policies."""
    tasks: tuple[str, ...] = ()
    """Of lm-eval: names, or YAML files."""
    max_new_tokens: int = 512
    batch_size: int = 64
    """Responses sampled, and texts scored, at once."""
    precision: str = "float32"
    seed: int = 0
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of prompts that a policy cannot hold."""
    deadline_s: float = 120.0
    """For one try of a request to an endpoint."""
    parallel: int = 8
    """Requests to an endpoint at the same time."""


DEFAULT = Settings()


@dataclass(frozen=True)
class Response:
    text: str
    length: int | None  # tokens, EOS included; None where an endpoint does not tell
    finished: bool  # ended with EOS, not by the limit of tokens
    prompt_ids: list[int] = field(default_factory=list)  # what the model read before it
    tokens: list[int] = field(default_factory=list)
    logprob: float | None = None  # nats, at the sampling temperature


class Responses(NamedTuple):
    rows: list[Response | None]
    reasons: list[str]  # why some are None


class Policy(Protocol):
    def unfit(self, prompts: Sequence[Prompt]) -> list[str]:
        """Why it cannot hold some of the prompts."""
        ...

    def respond(self, prompts: Sequence[Prompt], ids: Sequence[int], temperature: float, advance: Advance) -> Responses:
        """A response to each prompt. The random numbers of a response depend on its id alone, so policies that are
        compared use the same ones.
        """
        ...

    def close(self) -> None: ...


class ModelPolicy:
    """A causal model in a folder: ours or another one with a chat template of its own."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.tokenizer, self._settings = load_tokenizer(folder), settings
        self._device = device()
        causal: Any = load_causal(folder)
        self._limit = positions(causal.config)
        ends = format_of(self.tokenizer).stop_ids, self.tokenizer.pad_token_id
        self._sampler = InProcessSampler(causal, *ends, settings.precision, self._device)

    def respond(self, prompts: Sequence[Prompt], ids: Sequence[int], temperature: float, advance: Advance) -> Responses:
        encoded, unfit = self._encode(prompts)
        there = [row for row, prompt in enumerate(encoded) if prompt is not None]
        advance(len(unfit))
        found: list[Response | None] = [None] * len(prompts)
        settings = self._settings
        sampling = SamplingConfig(
            temperature=temperature, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size
        )
        part = [prompt for row in there if (prompt := encoded[row]) is not None]
        if part:
            for row, response in zip(there, self._sample(part, [ids[row] for row in there], sampling), strict=True):
                found[row] = response
        advance(len(there))
        return Responses(found, unfit)

    def unfit(self, prompts: Sequence[Prompt]) -> list[str]:
        return self._encode(prompts)[1]

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[list[EncodedPrompt | None], list[str]]:
        """The prompts with their tokens, None for those that do not fit, and why."""
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

    def _sample(
        self, prompts: Sequence[EncodedPrompt], ids: Sequence[int], sampling: SamplingConfig
    ) -> Iterator[Response]:
        longest = max(len(prompt.tokens) for prompt in prompts)
        batch = to(prompt_batch(self.tokenizer, prompts, ids, longest), self._device)
        rollout = self._sampler.sample(batch, sampling, self._settings.seed, ITERATION)
        texts = responses_of(rollout, prompts, self.tokenizer).texts
        tokens_BR = rollout.tokens_BT[:, -rollout.response_mask_BR.shape[1] :].tolist()
        logprobs = torch.where(rollout.response_mask_BR, rollout.behaviour_logprobs_BR, 0.0).sum(1).tolist()
        lengths, finished = rollout.response_mask_BR.sum(1).tolist(), rollout.finished_B.tolist()
        for prompt, text, n, done, tokens, logprob in zip(
            prompts, texts, lengths, finished, tokens_BR, logprobs, strict=True
        ):
            yield Response(text, n, done, prompt.tokens, tokens[:n], logprob)

    def close(self) -> None:
        self._sampler.close()


class EndpointPolicy:
    """A model behind an OpenAI-compatible endpoint. It writes its prompts itself and tells no tokens."""

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self._endpoint, self._settings, self._answered = endpoint, settings, False

    def respond(self, prompts: Sequence[Prompt], ids: Sequence[int], temperature: float, advance: Advance) -> Responses:
        """Responses that failed are left out. UserError (2, 4, 8) where none can come."""
        bodies = [
            {
                "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
                "temperature": temperature,
                "max_tokens": self._settings.max_new_tokens,
                "seed": (self._settings.seed * SEEDS_APART + number) % SEEDS,
            }
            for prompt, number in zip(prompts, ids, strict=True)
        ]
        completed = self._endpoint.complete(bodies, advance, self._answered)
        self._answered |= any(not isinstance(found, Failure) for found in completed)
        rows: list[Response | None] = []
        reasons = []
        for prompt, found in zip(prompts, completed, strict=True):
            if isinstance(found, Failure):
                rows.append(None)
                reasons.append(f"{prompt.source}: {found.reason}")
            else:
                rows.append(Response(found.text, found.tokens, found.finished))
        return Responses(rows, reasons)

    def unfit(self, prompts: Sequence[Prompt]) -> list[str]:
        return []  # it tells by an error

    def close(self) -> None:
        pass


def open_policy(model: str, settings: Settings) -> Policy:
    if is_endpoint(model):
        return EndpointPolicy(endpoint_of(model, settings), settings)
    return ModelPolicy(model_folder(model), settings)


def check_policy(model: str, settings: Settings) -> None:
    """The errors of `open_policy` that are known without loading weights or sending a request."""
    if not is_endpoint(model):
        model_folder(model)
        return
    endpoint_of(model, settings)
    if settings.reference is not None:
        raise UserError(
            f"--reference: {model} tells no tokens, so it has no KL; leave --reference out, or the endpoint among the models"
        )


def endpoint_of(model: str, settings: Settings = DEFAULT) -> Endpoint:
    return Endpoint.parse(model, model, deadline_s=settings.deadline_s, parallel=settings.parallel)


def is_endpoint(model: str) -> bool:
    return model.startswith(PREFIX)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
