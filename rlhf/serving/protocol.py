"""Requests as OpenAI's interface has them, and the responses to them.

What would change the output and is not there (tools, penalties, JSON mode) is refused; unknown fields are, too, because
most are typing errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from rlhf.serving.store.tables import LONGEST_ID, LONGEST_NAME, Label, Rating, Vote

MOST_CHOICES, MOST_STOPS, MOST_MESSAGES, MOST_PROMPTS = 16, 16, 1000, 64

Text = Annotated[str, Field(max_length=10_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Token = Annotated[int, Field(ge=0, le=2**31)]


def _nothing(value: Any) -> None:
    if value:
        raise ValueError("this server has no such thing: leave it out")


def _no(value: bool) -> bool:
    _nothing(value)
    return value


Nothing = Annotated[Any, BeforeValidator(_nothing)]
# Literal[False] would take 0 for False, and Literal[1] True for 1.
No = Annotated[bool, AfterValidator(_no), Field(json_schema_extra={"const": False})]
One = Annotated[int, Field(ge=1, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES)]
    name: str | None = None
    refusal: None = None


class Turn(BaseModel):
    """A message as chat formats read it."""

    role: str
    content: str


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(_Strict):
    model: str | None = Field(None, description="One of /v1/models; the first where it is left out.")
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(
        None, min_length=1, max_length=LONGEST_NAME, description="Who asks: what is kept of a person can be deleted."
    )
    # Without effect: about OpenAI's own service, or at values that change nothing.
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
    logit_bias: Nothing = None

    @field_validator("temperature", "top_p", "n", "stream", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def turns(self, system: str) -> list[Turn]:
        """`system` is said where the messages say none."""
        turns = [Turn(role=_ROLES.get(each.role, each.role), content=_text(each.content)) for each in self.messages]
        return [Turn(role="system", content=system), *turns] if system and turns[0].role != "system" else turns


class CompletionRequest(_Request):
    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1, max_length=10_000_000)]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: No | None = None
    suffix: Literal[""] | None = None
    best_of: One | None = None

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class PredictRequest(_Strict):
    text: Text
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: str | None = Field(None, min_length=1, max_length=LONGEST_NAME)


class Prediction(BaseModel):
    id: str
    text: str
    model: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    guard: dict[str, Any] | None = Field(
        None, description="What the guard says of prompt and response, if there is one."
    )


Labels = Annotated[list[Label], Field(max_length=3)]


class VoteRequest(_Strict):
    """What a person thinks of one response (`thumb`, `edit`), or which of two is better (`second`, `chosen`, `rating`).

    The id of a response is the id of its completion, a colon and its index: chatcmpl-…:0.
    """

    first: str = Field(max_length=LONGEST_ID, description="The response that was shown first, or on the left.")
    second: str | None = Field(None, max_length=LONGEST_ID)
    chosen: Literal["first", "second"] | None = None
    rating: Rating | None = Field(None, description="By how much it is better; negligibly is also unsure.")
    thumb: Literal["up", "down"] | None = None
    edit: Text | None = Field(None, description="The first response as the person would have it.")
    labels: dict[Literal["first", "second"], Labels] = Field(default_factory=dict)
    user: str | None = Field(None, min_length=1, max_length=LONGEST_NAME)

    @model_validator(mode="after")
    def _is_complete(self) -> VoteRequest:
        if self.second is None:
            if self.chosen or self.rating or "second" in self.labels:
                raise ValueError("chosen, rating and labels of the second are about two responses: name the second")
            if not (self.thumb or self.edit or self.labels):
                raise ValueError("say something about the response: thumb, edit or labels")
        elif self.chosen is None or self.rating is None or self.thumb or self.edit:
            raise ValueError("a comparison has chosen and rating, and neither thumb nor edit")
        elif self.first == self.second:
            raise ValueError("first and second are the same response")
        return self

    def vote(self) -> Vote:
        return Vote(**self.model_dump())


class Voted(BaseModel):
    kept: bool


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The form of every error."""

    error: ErrorBody


_ROLES = {"developer": "system"}


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
