"""Chat completions of an OpenAI-compatible endpoint, many at a time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf.errors import UserError

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

PREFIX = "openai:"
KEY = "OPENAI_API_KEY"
TRIES = 4  # of one request
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between two tries; it doubles
GIVE_UP = 8  # failures before the first success, after which nothing is expected of the endpoint
OK, SERVER_ERROR = 200, 500
REFUSES_BODY = {400, 422}
PASSING = {408, 409, 425, 429}  # client errors that another try may not have
WHAT_TO_DO = {  # of statuses that every request would get: exit code, and what to do
    401: (2, "set the key in {keys}"),
    403: (2, "the key in {keys} may not use this model"),
    404: (4, "check the model's name and the URL, which often ends in /v1"),
    405: (4, "check the URL, which often ends in /v1"),
}
SHOWN = 300  # characters of a server's message

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int | None  # as the server counts them; None where it does not
    finished: bool  # not cut off by the limit of tokens


@dataclass(frozen=True)
class Failure:
    reason: str


class TryFailed(Exception):
    """`again`: another try may succeed, but not before `pause_s`."""

    def __init__(self, reason: str, again: bool, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.pause_s = again, pause_s


@dataclass(frozen=True)
class Endpoint:
    """`MODEL@URL`, where URL/chat/completions answers. The key is read from the environment when requests are sent, and
    appears in no message.
    """

    model: str
    url: str
    deadline_s: float = 120.0  # of one try
    parallel: int = 8  # requests at the same time
    keys: Sequence[str] = (KEY,)  # variables of the environment; the first that is set counts

    @classmethod
    def parse(cls, text: str, option: str, **settings: Any) -> Endpoint:
        """UserError (2) for what is not MODEL@URL."""
        found = re.fullmatch(r"(?P<model>.+?)@(?P<url>https?://.+)", text.removeprefix(PREFIX))
        try:
            url = urlsplit(found["url"]) if found else None
            complete = url is not None and url.hostname and url.port != 0
        except ValueError:  # its port is no number
            complete = False
        if not (found and url and complete):
            raise UserError(f"{option}: give MODEL@URL, for instance my-model@http://localhost:8000/v1")
        if url.username or url.password or url.query or url.fragment:
            raise UserError(f"{option}: the URL has a user, password or query; a key belongs in {KEY}")
        return cls(found["model"], found["url"].rstrip("/"), **settings)

    def complete(
        self, bodies: Sequence[Body], done: Callable[[int], object] = lambda _: None, answered: bool = False
    ) -> list[Completion | Failure]:
        """The answer to each body of a request, to which the model is added.

        UserError (2, 4) where no request can succeed: key, address or model is wrong; (8) where none did, unless it has
        `answered` before.
        """
        return asyncio.run(self._complete(bodies, done, answered))

    async def _complete(
        self, bodies: Sequence[Body], done: Callable[[int], object], some: bool
    ) -> list[Completion | Failure]:
        import httpx2

        slots, failures = asyncio.Semaphore(self.parallel), 0
        key = self.key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=self.parallel)
        async with httpx2.AsyncClient(timeout=None, limits=limits, headers=headers) as client:

            async def one(body: Body) -> Completion | Failure:
                nonlocal failures, some
                async with slots:
                    found = await self._with_retries(client, {"model": self.model, **body})
                some |= isinstance(found, Completion)
                failures += isinstance(found, Failure)
                if isinstance(found, Failure) and not some and failures >= min(GIVE_UP, len(bodies)):
                    raise UserError(
                        f"{self.model} at {self.url}: no response to {failures} requests: {found.reason}", 8
                    )
                done(1)
                return found

            return await asyncio.gather(*map(one, bodies))

    async def _with_retries(self, client: AsyncClient, body: Body) -> Completion | Failure:
        pause_s = FIRST_PAUSE_S
        for left in reversed(range(TRIES)):
            try:
                async with asyncio.timeout(self.deadline_s):
                    return await self._once(client, body)
            except TimeoutError:
                failed = TryFailed(f"no response within {self.deadline_s:g} s", again=True)
            except TryFailed as error:
                failed = error
            if not (failed.again and left):
                break
            wait_s = max(pause_s * random.uniform(0.5, 1.0), min(failed.pause_s, LONGEST_PAUSE_S))
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return Failure(str(failed))

    async def _once(self, client: AsyncClient, body: Body) -> Completion:
        import httpx2

        try:
            response = await client.post(f"{self.url}/chat/completions", json=body)
        except httpx2.RequestError as error:
            raise TryFailed(f"{type(error).__name__}: {self._shown(str(error))}", again=True) from error
        if response.status_code == OK:
            return completion(response.content)
        if response.status_code in REFUSES_BODY and (other := adapted(body, response.text)):
            return await self._once(client, other)
        message = f"status {response.status_code}: {self._shown(response.text)}"
        if response.status_code in WHAT_TO_DO:
            exit_code, what_to_do = WHAT_TO_DO[response.status_code]
            keys = " or ".join(self.keys)
            raise UserError(f"{self.model} at {self.url}: {message}; {what_to_do.format(keys=keys)}", exit_code)
        again = response.status_code in PASSING or response.status_code >= SERVER_ERROR
        raise TryFailed(message, again, asked_pause(response))

    def key(self) -> str:
        return next((value for name in self.keys if (value := os.environ.get(name, "").strip())), "")

    def _shown(self, message: str) -> str:
        """A server's message in one short line without the key, which some servers repeat."""
        line = " ".join(message.split())
        return (line.replace(key, "***") if (key := self.key()) else line)[:SHOWN]


def adapted(body: Body, message: str) -> Body | None:
    """The body without what a server's message names: endpoints differ in what they take."""
    if "max_completion_tokens" in message and "max_tokens" in body:
        return {
            **{key: value for key, value in body.items() if key != "max_tokens"},
            "max_completion_tokens": body["max_tokens"],
        }
    if "seed" in message and "seed" in body:
        return {key: value for key, value in body.items() if key != "seed"}
    return None


def asked_pause(response: Response) -> float:
    """Seconds that the server asks to wait before another try."""
    text = response.headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else 0.0


def completion(content: bytes) -> Completion:
    """TryFailed for what is no chat completion, or has no text."""
    try:
        found = json.loads(content)
        choice = found["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
        tokens = (found.get("usage") or {}).get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TryFailed(f"no chat completion: {type(error).__name__}", again=True) from error
    if not isinstance(text, str):
        raise TryFailed("a message without text", again=False)
    if ended == "content_filter":
        raise TryFailed("the server's content filter withheld it", again=False)
    counted = tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None
    return Completion(text, counted, ended != "length")
