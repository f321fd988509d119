"""What responses are worth: reward models and functions, by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from launch.evaluate.policy.policies import Response, Settings, device
from launch.model_folder import model_folder
from launch.score import Text, load_reward_model, score_texts, texts_for
from reward_data import Prompt
from rlhf.chat import format_of
from rlhf.errors import UserError
from rlhf.evaluation.items import Item
from rlhf.evaluation.refusals import matches
from rlhf.models import load_tokenizer
from rlhf.rewards import FunctionReward, text_responses
from rlhf.user_code import load_object

AT_ONCE = 512  # responses in one call of a function

log = logging.getLogger(__name__)


class Scorer(Protocol):
    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float | None]:
        """A score for each response; None where it failed."""
        ...


def open_scorer(name: str, reward: str, settings: Settings) -> Scorer:
    """`reward` is a reward model (folder, hub name), or a function: `module:function`, `file.py:function`.

    UserError (2) for a function that is not there, (4) for a model that is not there or no reward model.
    """
    if is_function(reward):
        return FunctionScorer(name, reward)
    return ModelScorer(model_folder(reward), settings)


def check_rewards(rewards: Mapping[str, str]) -> None:
    """The errors of `open_scorer` that are known without loading weights."""
    for name, reward in rewards.items():
        if is_function(reward):
            FunctionScorer(name, reward)
        else:
            model_folder(reward)


def is_function(reward: str) -> bool:
    return ":" in reward and not Path(reward).expanduser().exists()


class FunctionScorer:
    def __init__(self, name: str, code: str, option: str = "--reward") -> None:
        function = load_object(code, f"{option} {name}".strip())
        self._reward = FunctionReward(name, function)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float | None]:
        self._reward.check_columns(prompts)
        found: list[float | None] = []
        for start in range(0, len(responses), AT_ONCE):
            part = responses[start : start + AT_ONCE]
            texts, finished = [one.text for one in part], [one.finished for one in part]
            scored = self._reward(text_responses(prompts[start : start + AT_ONCE], texts, finished))
            rows = zip(scored.values_B.tolist(), scored.failed_B.tolist(), strict=True)
            found += [None if failed else value for value, failed in rows]
        return found


class ModelScorer:
    """A reward model of any kind that `rlhf score` reads. It reads texts, so the policies may have other tokenizers."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._tokenizer, model = load_tokenizer(folder), load_reward_model(folder)
        self._model: Any = model.to(device())
        self._settings = settings

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float | None]:
        items = [
            Item("list", prompt.messages, (response.text,), 0, prompt.source, "")
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        texts, unfit = texts_for(self._model, self._tokenizer, items)
        for reason in unfit[:1]:
            log.warning("%d responses cannot be scored; the first: %s", len(unfit), reason)
        texts = [text if responses[text.row].finished else self._without_end(text) for text in texts]
        found: list[float | None] = [None] * len(items)
        scores = score_texts(
            self._model, self._tokenizer.pad_token_id, texts, self._settings.batch_size, self._settings.precision
        )
        for text, score in zip(texts, scores, strict=True):
            found[text.row] = score
        return found

    def _without_end(self, text: Text) -> Text:
        """What PPO's rewards read of a response that was cut off: it does not end with EOS."""
        ends = text.ids[-1] in format_of(self._tokenizer).stop_ids
        return Text(text.row, text.ids[:-1], text.prompt) if ends else text


class RefusalScorer:
    """1 for a response that refuses: it has a pattern, or a function says so."""

    def __init__(self, refusal: str) -> None:
        self._pattern = refusal
        self._function = FunctionScorer("", refusal, "--refusal") if names_function(refusal) else None
        if self._function is None:
            try:
                re.compile(refusal)
            except re.error as error:
                raise UserError(f"--refusal: {refusal!r} is no pattern: {error}") from error

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float | None]:
        if self._function is not None:
            return self._function.score(prompts, responses)
        return [float(found) for found in matches(self._pattern, [response.text for response in responses])]


def names_function(code: str) -> bool:
    """`module:function` or `file.py:function`, which a pattern hardly looks like."""
    return re.fullmatch(r"[\w./\\~-]+:[A-Za-z_]\w*", code) is not None


def named(rewards: Sequence[str]) -> dict[str, str]:
    """`NAME=REWARD` arguments. UserError (2) for one that is not, or a name given twice."""
    found: dict[str, str] = {}
    for argument in rewards:
        name, equals, reward = argument.partition("=")
        if not equals or not name or not reward:
            raise UserError(f"--reward {argument}: give NAME=FOLDER, NAME=module:function or NAME=file.py:function")
        if name in found:
            raise UserError(f"--reward {name} is given twice")
        found[name] = reward
    return found
