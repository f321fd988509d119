"""`rlhf chat`: talk with a model in the terminal; its response appears as it is sampled."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor

from launch.model_folder import model_folder
from reward_data import Message
from rlhf.chat import ChatFormat, format_of
from rlhf.chat.stream import UNFINISHED, TextStream
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer, positions

HELP = "/reset forgets the dialogue, /system TEXT sets the system text, /exit leaves; Ctrl-C stops a response"
SURROGATE = re.compile(r"[\ud800-\udfff]")  # what stands for a byte that is no text
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model must not steer the terminal


@dataclass
class Dialogue:
    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def asking(self, text: str) -> list[Message]:
        """The messages that the model reads when `text` is said next."""
        opening = [Message("system", self.system)] if self.system else []
        return [*opening, *self.turns, Message("user", text)]

    def keep(self, text: str, response: str, chat_format: ChatFormat) -> None:
        """A response that the format cannot hold, empty or with a tag in it, leaves no trace."""
        said = [Message("user", text), Message("assistant", response)]
        with suppress(UserError):
            chat_format.validate([*self.asking(text), said[1]])
            self.turns += said if response else []


def chat(model: str, temperature: float, max_new_tokens: int, lines: TextIO | None = None) -> None:
    """Answers the lines of `lines` (default: the terminal or whatever stdin is) until they end or one says /exit."""
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    causal = load_causal(folder, dtype=dtype).eval()
    causal.to(device)  # type: ignore[arg-type]
    dialogue, chat_format = Dialogue(), format_of(tokenizer)
    source: TextIO = lines or sys.stdin
    for text in _asked(source):
        if text == "/exit":
            return
        if text.startswith("/"):
            print(command(dialogue, text))
            continue
        try:
            ids = chat_format.encode_prompt(dialogue.asking(text))
            room = min(max_new_tokens, _room(causal, len(ids)))
        except UserError as error:
            print(f"error: {error.message}", file=sys.stderr)
            continue
        response = sample(causal, ids, chat_format.stop_ids, temperature, room)
        dialogue.keep(text, say(response, tokenizer, stoppable=source.isatty()), chat_format)


def command(dialogue: Dialogue, text: str) -> str:
    """Obey a line that starts with a slash; what to tell the person."""
    name, _, rest = text.partition(" ")
    if name == "/reset":
        dialogue.turns.clear()
        return "the dialogue is forgotten"
    if name == "/system":
        dialogue.system = rest.strip()
        dialogue.turns.clear()
        return f"a new dialogue, {'with this system text' if dialogue.system else 'without a system text'}"
    return HELP


def sample(
    model: Any, ids: list[int], stop_ids: Collection[int], temperature: float, max_new_tokens: int
) -> Iterator[int]:
    """Token ids of a response to the prompt `ids`, without the one of `stop_ids` that ends it."""
    tokens_BT = torch.tensor([ids], device=model.device)
    cache = None
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            output = model(tokens_BT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = _draw(output.logits[0, -1], temperature)
        if token in stop_ids:
            return
        yield token
        tokens_BT = torch.tensor([[token]], device=model.device)


def _draw(logits_V: Tensor, temperature: float) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V.float() / temperature).softmax(-1), 1))


def say(tokens: Iterator[int], tokenizer: Any, stoppable: bool) -> str:
    """Print the response as it comes; Ctrl-C ends it if it is `stoppable`. Returns what was said."""
    stream = TextStream(tokenizer)
    try:
        for token in tokens:
            print(CONTROL.sub("", stream.push(token)), end="", flush=True)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        print(CONTROL.sub("", stream.finish()), "[stopped]")
    else:
        print(CONTROL.sub("", stream.finish()))
    return stream.text


def _room(model: Any, length: int) -> int:
    """How many tokens fit behind a prompt of `length` tokens."""
    limit = positions(model.config)
    if limit is not None and length >= limit:
        raise UserError(f"the dialogue has {length} tokens and the model holds {limit}; /reset starts a new one")
    return sys.maxsize if limit is None else limit - length


def _asked(lines: TextIO) -> Iterator[str]:
    """What the person says, without blank lines. In a terminal there is a prompt, and Ctrl-D leaves."""
    if isinstance(lines, io.TextIOWrapper):
        lines.reconfigure(errors="replace")  # bytes that are no text; the encoding may say they become half characters
    if not lines.isatty():
        yield from (line.strip() for line in lines if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  line editing in input()
    print(f"{HELP}; Ctrl-D leaves too")
    while True:
        try:
            text = SURROGATE.sub(UNFINISHED, input("> ").strip())  # input() has a way of its own to decode
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}; Ctrl-D leaves too")
            continue
        if text:
            yield text
