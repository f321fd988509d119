"""What a row says beyond what its converter reads: context, verdicts, a dialogue inside a text. None is dropped silently."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reward_data.converters.fields import ROLES, TRANSCRIPT, shown, spoken
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Preference, Record, prompt_of

CONTEXT = (  # in small letters
    *("system", "system_prompt", "system_message", "preamble", "context", "instruction", "input", "prompt"),
    *("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history", "past_user_inputs"),
    *("messages", "conversations", "conversation", "dialog", "dialogue"),
)
PAIRED = ("chosen", "rejected")  # a demonstration is the first of them, and that is meant
MATERIAL = ("passage", "passages", "document", "documents", "article", "knowledge", "background", "persona")
ASSISTANTS = [name for name, role in ROLES.items() if role == "assistant"]
LOOKED_AT = 1000  # rows that tell which keys are not read
TOOLS = ("tools", "functions")
VERDICTS = (
    *("label", "desirable", "is_desirable", "accepted", "liked", "is_good", "thumbs", "thumbs_up", "feedback"),
    *("is_safe", "safe", "is_correct", "correct"),
)
GRADES = ("score", "rating", "reward", "scores", "ratings", "rewards")
GRADE = re.compile(
    "chosen.*(score|rating)|(score|rating).*chosen"
)  # a reward is what a model says, and people may differ
BAD_WORDS = {"false", "bad", "no", "rejected", "undesirable", "thumbs_down", "thumbs down", "thumbsdown", "down"} | {
    *("dislike", "disliked", "👎")
}
GOOD_WORDS = {"true", "good", "yes", "chosen", "desirable", "thumbs_up", "thumbs up", "thumbsup", "up", "like"} | {
    *("liked", "👍")
}
SPECIAL = re.compile(  # a turn as the chat templates of other models open it
    r"^[ \t]*(<\|(?:im_start|im_user|start)\|>[ \t]*(?:system|user|assistant)\b|<\|start_header_id\|>"
    r"|<start_of_turn>(?:user|model)\b|<\|(?:system|user|assistant|prompter)\|>|<\|START_OF_TURN_TOKEN\|>"
    r"|<｜(?:User|Assistant)｜>|\[\|(?:Human|AI)\|\]|<(?:human|bot)>:|### (?:Human|Assistant):)",
    re.MULTILINE,
)
LLAMA2 = re.compile(r"\A\s*(?:<s>)?\s*(\[INST\]).*\[/INST\]", re.DOTALL)
ENDS = re.compile(
    r"(<\|(?:im_end|eot_id|endoftext|end_of_text|end|eot|return|END_OF_TURN_TOKEN)\|>|<end_of_turn>|<｜end▁of▁sentence｜>)\s*\Z"
)
LAST_EOS = re.compile(r"\A(?!.+<s>).*(</s>)\s*\Z", re.DOTALL)  # after <s> it may be HTML
ALPACA = re.compile(r"\A\s*(?:Below is an instruction.*?)?(### Instruction:).*^### Response:", re.MULTILINE | re.DOTALL)
FOREIGN = (SPECIAL, ENDS, LAST_EOS, LLAMA2, ALPACA)
VICUNA = re.compile(r"(?:\A|^|[.] )(USER:) .*\sASSISTANT:", re.MULTILINE | re.DOTALL)
HH_TURN = re.compile(r"\A\s*(Human:).*\n\nAssistant:", re.DOTALL)  # from the start: a quoted one may stay
ARRAY = re.compile(r"\[\{.*\}\]\Z", re.DOTALL)
SPEAKER = re.compile(r"^(?:Human|User|USER|Assistant|ASSISTANT|### (?:Instruction|Response)):", re.MULTILINE)


def opened(row: Row) -> Row:
    """The row with every text that is nothing but a list of messages, in JSON or Python syntax, parsed into that list."""
    if isinstance(row.value, Mapping):
        value: Any = {key: _opened(text) for key, text in row.value.items()}
    else:
        value = _opened(row.value)
    return row if value == row.value else Row(value, row.place, row.fault)


def _opened(text: Any) -> Any:
    turns = turns_in(text) if isinstance(text, str) else None
    return text if turns is None else turns


def turns_in(text: str) -> list[dict[str, Any]] | None:
    """The messages if the text is nothing but a list of messages, else None."""
    text = text.strip()
    if text.startswith(('"[', '"{')) and isinstance(inner := _parsed(text), str):  # JSON inside JSON
        text = inner.strip()
    if not (text.startswith(("[", "{")) and text.endswith(("]", "}"))):
        return None
    value = _parsed(text)
    if isinstance(value, dict):
        value = next((value[key] for key in ("messages", "conversations") if key in value), [value])
    return value if isinstance(value, list) and value and all(map(_is_message, value)) else None


def _parsed(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval, _parsed_array):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _parsed_array(text: str) -> list[Any]:
    """A list of dicts as NumPy prints it, without commas between them: pandas writes a column of a Parquet file so."""
    if not ARRAY.match(text):
        raise ValueError("not an array of dicts")
    return [ast.literal_eval(part) for part in re.split(r"(?<=\})\s+(?=\{)", text[1:-1].strip())]


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role = value.get("role", value.get("from"))
    return isinstance(role, str) and role.lower() in ROLES and ("content" in value or "value" in value)


def refuse_outranked(row: Row) -> None:
    """BadRow if a rejected response has a higher score than the chosen one."""
    value = row.value
    if not isinstance(value, Mapping):
        return
    for chosen in filter(GRADE.search, map(str, value)):
        rejected = chosen.replace("chosen", "rejected")
        good, bad = _figure(value.get(chosen)), _figure(value.get(rejected))
        if good is not None and bad is not None and bad > good:
            raise BadRow(
                f"rejected scores higher than chosen: key '{rejected}' is {shown(value[rejected])}, '{chosen}' is "
                f"{shown(value[chosen])} ({value[rejected]} > {value[chosen]}); swap the responses or leave the row out",
                "rejected_scores_higher",
            )


def _figure(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def refuse_lost_context(row: Row, record: Record, kind: str, held_elsewhere: Sequence[str] = ()) -> None:
    """BadRow if a key of context holds text that is not in the record. A prompt's columns may be for its rewards."""
    if not isinstance(row.value, Mapping):
        return
    read = [_squeezed(text) for _, text in _texts_of(record)]
    for key, value in row.value.items():
        name = str(key).lower()
        if name in TOOLS and kind != "prompts":
            texts = _names_in(value)
        else:
            texts = _texts_in(value) if name in CONTEXT or (name in MATERIAL and kind != "prompts") else ()
        for text in texts:
            if key not in held_elsewhere and not any(_squeezed(text) in other for other in read):
                raise BadRow(
                    f"key '{key}' holds context that the prompt does not: {shown(text)}; put it into the prompt "
                    "(as system message or earlier turn), or leave the key out (columns names those that are read)",
                    "lost_context",
                )


def _names_in(tools: Any) -> Iterator[str]:
    """The names of functions; a text of a system message that describes them holds these."""
    if isinstance(tools, str) and tools.strip():
        yield tools
    for tool in tools if isinstance(tools, list) else []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield function["name"]


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str) and TRANSCRIPT.match(value):
        yield from (turn.content for turn in spoken(value, "prompt"))
    elif isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, Mapping):
        for key in ("content", "value"):
            yield from _texts_in(value.get(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _texts_of(record: Record) -> list[tuple[str, str]]:
    if isinstance(record, Preference):
        answers = [("assistant", record.chosen), ("assistant", record.rejected)]
        return [*((m.role, m.content) for m in record.prompt), *answers]
    return [(m.role, m.content) for m in record.messages]


def refuse_transcripts(record: Record) -> None:
    """BadRow if a text of the record is itself a dialogue, or a response continues with a turn of the human."""
    for role, text in _texts_of(record):
        forms = (*FOREIGN, VICUNA, HH_TURN) if role == "assistant" else FOREIGN
        found = next(filter(None, (form.search(text) for form in forms)), None)
        if found or turns_in(text):
            what = repr(found[found.lastindex or 0]) if found else "a list of messages"
            raise BadRow(
                f"the text of the {role} {shown(text)} holds a dialogue of its own ({what}); give its turns as messages",
                "dialogue_in_text",
            )


class Verdicts:
    """Finds responses that people rejected. It first looks at all rows of a file, because a label may be 0, 1 or 2."""

    def __init__(self, rows: Sequence[Row]) -> None:
        values = [row.value for row in rows if isinstance(row.value, Mapping)]
        self.binary = {key for key in (*VERDICTS, *GRADES) if _is_verdict([v.get(key) for v in values])}

    def refuse_unwanted(self, row: Row) -> None:
        """BadRow for a response with a verdict such as `label: false`, or a grade below zero."""
        if not isinstance(row.value, Mapping):
            return
        for key in (*VERDICTS, *GRADES):
            value = row.value.get(key)
            figure = _figure(value)
            below = key in GRADES and figure is not None and figure < 0
            if below or (key in self.binary and _word(value) in {*BAD_WORDS, "0", "0.0", "-1", "-1.0"}):
                raise BadRow(
                    f"key '{key}' is {shown(value)}: a response that should not be trained on; leave the row out",
                    "unwanted_answer",
                )
        for dialogue in ("messages", "conversations"):
            _refuse_weightless(row.value.get(dialogue), dialogue)


def _refuse_weightless(turns: Any, key: str) -> None:
    """BadRow for a response that is not to be learned, as OpenAI and Axolotl write it: SFT learns all of a dialogue."""
    for n, turn in enumerate(turns if isinstance(turns, list) else []):
        for part in ("weight", "train", "training") if isinstance(turn, Mapping) else ():
            if (turn.get("role") or turn.get("from")) in ASSISTANTS and turn.get(part) in (0, False):
                raise BadRow(
                    f"key '{key}[{n}].{part}' is {shown(turn[part])}: a response that should not be trained on, but SFT "
                    "trains on every response of a dialogue; leave the row out, or cut it off before this turn",
                    "unwanted_answer",
                )


def _is_verdict(values: list[Any]) -> bool:
    words = {_word(value) for value in values if value is not None}
    return bool(words) and words <= {*BAD_WORDS, *GOOD_WORDS, "0", "0.0", "1", "1.0", "-1", "-1.0", ""}


def _word(value: Any) -> str:
    return str(value).strip().lower() if isinstance(value, str | bool | int | float) else "other"


def suspicions(records: Sequence[Record], rows: Sequence[Row], kind: str) -> list[str]:
    """What looks wrong in a file although no single row is certainly bad."""
    answers = [a for record in records for a in _answers_of(record)]
    repeats = sum(1 for prompt, answer in answers if len(answer) > len(prompt) and answer.startswith(prompt))
    spoken = sum(1 for _, answer in answers if SPEAKER.search(answer))
    found = []
    if answers and repeats * 2 >= len(answers):
        found.append(f"{repeats} of {len(answers)} answers begin with their prompt; take the prompt out of them")
    if answers and spoken * 2 >= len(answers):
        found.append(f"{spoken} of {len(answers)} answers have lines that begin with a speaker, such as 'User:'")
    if kind == "demonstrations":
        found += _graded(rows)
    if kind != "prompts" and (keys := _unread(records, rows)):  # a prompt keeps its columns
        found.append(f"texts under {', '.join(keys)} are not read; if responses need them, put them into the prompt")
    return found


def _unread(records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    """Keys without a meaning of their own that hold sentences which no record has, in half of the first rows."""
    read: dict[str, str] = {}
    for record in records[:LOOKED_AT]:  # rows of one line share a place
        texts = " ".join(_squeezed(text) for _, text in _texts_of(record))
        read[record.source] = f"{read.get(record.source, '')} {texts}"
    seen = [row for row in rows if row.place in read and isinstance(row.value, Mapping)]
    lost = Counter(
        key
        for row in seen
        for key, text in row.value.items()
        if str(key).lower() not in CONTEXT + PAIRED and _is_lost(text, read[row.place])
    )
    return [repr(key) for key, count in lost.items() if count * 2 >= len(seen)]


def _is_lost(text: Any, read: str) -> bool:
    return isinstance(text, str) and len(text.split()) > 3 and _squeezed(text) not in read


def _answers_of(record: Record) -> list[tuple[str, str]]:
    prompt = prompt_of(record)[-1].content.strip()
    if isinstance(record, Preference):
        return [(prompt, record.chosen.strip()), (prompt, record.rejected.strip())]
    last = record.messages[-1]
    return [(prompt, last.content.strip())] if last.role == "assistant" else []


def _graded(rows: Sequence[Row]) -> Iterator[str]:
    for key in GRADES:
        metrics = [_figure(row.value.get(key)) for row in rows if isinstance(row.value, Mapping)]
        known = [figure for figure in metrics if figure is not None]
        if known and min(known) < max(known):
            yield f"key '{key}' grades the answers from {min(known):g} to {max(known):g}, and all of them are trained on"
