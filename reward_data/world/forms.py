"""Values as text in a demanded form, and back: ("apple", "cup") with commas is `apple, cup`."""

from __future__ import annotations

from reward_data.world.tasks import LIST_FORMS, NUMBER_FORMS, Task, forms_of
from reward_data.world.words import ITEMS, NUMBERS

_IN_DIGITS, _IN_WORDS = NUMBER_FORMS


def write(values: tuple[str, ...], form: str) -> str:
    if form in LIST_FORMS:
        return LIST_FORMS[form].join(values)
    (value,) = values
    return NUMBERS[int(value) - 1] if form == _IN_WORDS else value


def read(text: str, task: Task) -> tuple[tuple[str, ...], str] | None:
    """Values and form of an answer to a task of this kind; None if the text is no such answer."""
    for form in forms_of(task.kind):
        values = _read_as(text, form)
        if values and (set(values) <= set(ITEMS) if task.answers_items else all(map(_is_number, values))):
            return values, form
    return None


def _read_as(text: str, form: str) -> tuple[str, ...] | None:
    if form in LIST_FORMS:
        values = tuple(text.split(LIST_FORMS[form]))
        return values if len(values) > 1 else None
    if form == _IN_WORDS:
        return (str(NUMBERS.index(text) + 1),) if text in NUMBERS else None
    return (text,)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
