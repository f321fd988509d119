"""A Python function as a reward: `function(prompts, responses, **columns) -> scores`."""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from reward_data import Prompt
from rlhf.errors import UserError
from rlhf.rewards.base import Responses, Scored

log = logging.getLogger(__name__)

OWN = ("prompts", "responses", "messages", "finished")
"""Arguments that every function may name, besides the columns of its rows."""


class FunctionReward:
    """Calls `function` with keyword arguments, those that it names. Each is a list with one entry per response:

    prompts    text of the last user message          messages  the prompt as [{"role": …, "content": …}, …]
    responses  text of the response                   finished  whether it ended with EOS
    <column>   the row's value of a column, None for rows without it; `**columns` takes all columns

    It returns one score per response. None and NaN are failed scores. If the function raises or takes longer than
    `timeout_s`, all of its scores have failed. UserError (2) for a function that names a column that no row has, or
    that does not return one number per response.
    """

    def __init__(self, name: str, function: Callable[..., Any], timeout_s: float = 60.0) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.last_failure = ""  # why the last scores failed that did, for people
        self.call_failed = False  # the last call raised or was late
        self._columns: set[str] = set()  # that some row of the run has
        self._function = function
        parameters = _parameters(name, function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._required = [p.name for p in parameters if p.name in self._named and p.default is p.empty]

    def __call__(self, responses: Responses) -> Scored:
        arguments = self._arguments(responses)
        self.call_failed = False
        try:
            returned = self._in_time(arguments)
        except Exception as error:  # whatever a user's function raises
            self.last_failure, self.call_failed = f"{type(error).__name__}: {error}", True
            log.warning("the reward %s failed", self.name, exc_info=error)
            returned = [None] * len(responses.texts)
        scores = [self._number(score) for score in self._as_list(returned, len(responses.texts))]
        values_B = torch.tensor([0.0 if score is None else score for score in scores])
        return Scored(values_B, torch.tensor([score is None for score in scores], dtype=torch.bool))

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """UserError (2) where the function names what no row has."""
        self._columns = columns = {key for prompt in prompts for key in prompt.columns}
        if missing := sorted({*self._required} - {*OWN} - columns):
            own = f"the columns {', '.join(sorted(columns))}" if columns else "no columns of their own"
            raise UserError(
                f"the reward {self.name} asks for {', '.join(missing)}, but the prompts have {own}; it may also ask for "
                f"{', '.join(OWN)}"
            )

    def _arguments(self, responses: Responses) -> dict[str, Any]:
        """The arguments that the function names. A column that none of these rows has is a list of None."""
        given: dict[str, Any] = {
            "prompts": [prompt.messages[-1].content for prompt in responses.prompts],
            "responses": list(responses.texts),
            "messages": [[{"role": m.role, "content": m.content} for m in p.messages] for p in responses.prompts],
            "finished": responses.rollout.finished_B.tolist(),
        }
        columns = {key for prompt in responses.prompts for key in prompt.columns} | {*self._required} | self._columns
        given |= {key: responses.column(key) for key in sorted(columns - {*OWN})}
        return given if self._takes_all else {key: given[key] for key in self._named if key in given}

    def _in_time(self, arguments: dict[str, Any]) -> Any:
        """The result of the function. A late call continues in its thread, but its result is ignored."""
        outcome: list[tuple[Any, BaseException | None]] = []

        def call() -> None:
            try:
                outcome.append((self._function(**arguments), None))
            except BaseException as error:  # noqa: BLE001  the caller raises it
                outcome.append((None, error))

        thread = threading.Thread(target=call, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if not outcome:
            raise TimeoutError(f"no result within {self.timeout_s:g} s")
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def _as_list(self, returned: Any, count: int) -> list[Any]:
        """A list, array or tensor with one entry per response."""
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, list | tuple) or len(values) != count:
            shape = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
            raise UserError(
                f"the reward {self.name} returned {shape} for {count} responses; it must return one score each"
            )
        return list(values)

    def _number(self, score: Any) -> float | None:
        """The score, or None if it failed: None, NaN, or a number too large for float32."""
        if score is None:
            self.last_failure = self.last_failure or "it returned None"
            return None
        try:
            value = float(score)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"the reward {self.name} returned {score!r}, which is no number") from None
        if math.isfinite(value) and abs(value) <= torch.finfo(torch.float32).max:
            return value
        self.last_failure = f"it returned {value}"
        return None


def _parameters(name: str, function: Any) -> list[inspect.Parameter]:
    """UserError (2) for anything that is not a function, or that takes positional-only arguments."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError) as error:
        raise UserError(f"the reward {name} is {function!r}, whose arguments cannot be read: {error}") from error
    if unnamed := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
        raise UserError(f"the reward {name} takes {', '.join(unnamed)} by position; it is called with names")
    if all(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise UserError(f"the reward {name} takes nothing by name; it is called with names, those of {', '.join(OWN)}")
    return parameters
