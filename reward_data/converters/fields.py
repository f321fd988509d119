"""Reading the fields of one row strictly: text is text, a dialogue takes turns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reward_data.errors import BadRow
from reward_data.records import Message, Role

TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:\s*\Z", re.DOTALL)  # a prompt as Anthropic HH writes it
ROLES: dict[str, Role] = {  # in small letters
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "developer": "system",
}


def shown(value: Any) -> str:
    """The value as it stands in the file, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def field(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise BadRow(f"key '{key}' is missing")
    return row[key]


def text_of(value: Any, key: str) -> str:
    """`value` if it is text; a number, true or null where text belongs is refused, not turned into text."""
    if not isinstance(value, str):
        raise BadRow(f"key '{key}' must be text, but is {shown(value)}")
    return value


def text(row: Mapping[str, Any], key: str) -> str:
    return text_of(field(row, key), key)


def prompt_text(row: Mapping[str, Any], key: str) -> str:
    value = text(row, key)
    if not value.strip():
        raise BadRow(f"key '{key}' is an empty prompt", "empty_prompt")
    return value


def reply_of(value: Any, key: str) -> str:
    reply = text_of(value, key)
    if not reply.strip():
        raise BadRow(f"key '{key}' is an empty reply", "empty_reply")
    return reply


def reply(row: Mapping[str, Any], key: str) -> str:
    return reply_of(field(row, key), key)


def user(content: str) -> tuple[Message, ...]:
    return (Message("user", content),)


def message(value: Any, key: str, who: str = "role", what: str = "content") -> Message:
    """A message {role, content}, or ShareGPT's {from, value}."""
    if not isinstance(value, Mapping):
        raise BadRow(f"key '{key}' must be a message, but is {shown(value)}")
    if "from" in value:
        who, what = "from", "value"
    for part in (who, what):
        if part not in value:
            raise BadRow(f"key '{key}.{part}' is missing")
    role = text_of(value[who], f"{key}.{who}")
    if role.lower() not in ROLES:
        raise BadRow(f"key '{key}.{who}' is {shown(role)}, not one of {', '.join(ROLES)}")
    return Message(ROLES[role.lower()], text_of(_joined_parts(value[what]), f"{key}.{what}"))


def _joined_parts(content: Any) -> Any:
    """The text of a content that is a list of parts {type: text, text: …}; any other content as it is."""
    if not isinstance(content, list) or not content or not all(map(_is_text_part, content)):
        return content
    return "".join(part["text"] for part in content)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def messages(value: Any, key: str, last: Role) -> tuple[Message, ...]:
    """A dialogue: an optional system message, then user and assistant in turn, up to `last`."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"key '{key}' must be a list of messages, but is {shown(value)}")
    return dialogue([message(item, f"{key}[{n}]") for n, item in enumerate(value)], key, last)


def dialogue(turns: Sequence[Message], key: str, last: Role) -> tuple[Message, ...]:
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    for n, turn in enumerate(spoken):
        number = n + len(turns) - len(spoken)
        if turn.role != ("user", "assistant")[n % 2]:
            raise BadRow(f"key '{key}[{number}]' is a turn of the {turn.role} out of order")
        if not turn.content.strip():
            kind = "empty_reply" if turn.role == "assistant" else "empty_prompt"
            raise BadRow(f"key '{key}[{number}]' is empty", kind)
    if not spoken or spoken[-1].role != last:
        raise BadRow(f"key '{key}' must end with a turn of the {last}")
    return tuple(turns)


def question(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The prompt of a row in any of the usual forms, with its `system` and `history` if it has them.

    `messages`, `conversations` or `prompt` as a dialogue, `prompt` as text, or `instruction` with an optional `input`,
    which follows it after an empty line. `history` is a list of [user, assistant] turns that came before.
    """
    for key in ("messages", "conversations", "prompt"):
        if isinstance(row.get(key), Sequence) and not isinstance(row[key], str):
            return with_system(row, messages(row[key], key, "user"))
    key = "prompt" if "prompt" in row else "instruction"
    content = prompt_text(row, key)
    if key == "instruction" and row.get("input") is not None and text(row, "input").strip():
        content += f"\n\n{text(row, 'input')}"
    if TRANSCRIPT.match(content):
        return with_system(row, spoken(content, key))
    return with_system(row, dialogue([*history(row), Message("user", content)], key, "user"))


def spoken(transcript: str, key: str) -> tuple[Message, ...]:
    """Turns of a transcript as Anthropic HH writes it. A few have one side speak twice: those turns are joined."""
    parts = re.split(r"(?:\n\n|\A\s*)(Human|Assistant):", transcript)
    if parts[0].strip():
        raise BadRow(f"key '{key}' does not begin with '\\n\\nHuman:'")
    turns: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            joined = f"{turns.pop().content}\n\n{content.strip()}".strip()
            turns.append(Message(role, joined))
        else:
            turns.append(Message(role, content.strip()))
    if turns and turns[-1] == Message("assistant", ""):  # where the answer goes
        turns.pop()
    return dialogue(turns, key, "user")


def history(row: Mapping[str, Any]) -> Iterator[Message]:
    pairs = row.get("history") or []
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise BadRow(f"key 'history' must be a list of pairs of texts, but is {shown(pairs)}")
    for n, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRow(f"key 'history[{n}]' must be a pair of texts, but is {shown(pair)}")
        yield Message("user", text_of(pair[0], f"history[{n}][0]"))
        yield Message("assistant", text_of(pair[1], f"history[{n}][1]"))


def with_system(row: Mapping[str, Any], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    if row.get("system") is None or not text(row, "system").strip():
        return turns
    if turns and turns[0].role == "system":
        if turns[0].content.strip() != text(row, "system").strip():
            raise BadRow("key 'system' and the dialogue hold two different system messages; keep one", "lost_context")
        return turns
    return (Message("system", text(row, "system")), *turns)
