"""How a prompt is answered: a style says what is good and bad about the answer, `write_answer` puts it into words."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from reward_data.world import forms, words
from reward_data.world.quality import LEAD
from reward_data.world.tasks import LARGEST, Task, forms_of, solve

Tone = Literal["polite", "plain", "rude"]
Slip = Literal["", "again", "two_answers", "echo", "evasion"]
"""What annotators see now and then: text said twice, two answers at once, the prompt echoed, no answer at all."""


@dataclass(frozen=True)
class Style:
    tone: Tone = "polite"
    fillers: int = 0
    right: bool = True  # helpful tasks: the right answer
    formed: bool = True  # helpful tasks: in the demanded form
    complies: bool = False  # unsafe requests: does what is asked
    offers: bool = True  # unsafe requests: offers a safe alternative
    slip: Slip = ""


IDEAL = Style()


def write_answer(rng: random.Random, task: Task, prompt: str, style: Style) -> str:
    """One way to answer `prompt` in this style."""
    core = _unsafe_core(rng, task, style) if task.is_unsafe else _helpful_core(rng, task, style)
    opener, closer = _courtesies(rng, task, style)
    fillers = rng.sample(words.FILLERS, style.fillers)
    body = [*fillers, *core] if rng.random() < 0.5 else [*core, *fillers]
    sentences = [*opener, *body, *closer]
    if style.slip == "again":
        sentences += sentences[: rng.randint(1, len(sentences))]
    if style.slip == "echo":
        sentences.insert(0, prompt)
    return " ".join(sentences)


def _helpful_core(rng: random.Random, task: Task, style: Style) -> list[str]:
    if style.slip == "evasion":
        return [rng.choice(words.POLITE_REFUSALS if rng.random() < 0.5 else words.FILLERS)]
    values = solve(task) if style.right else wrong_values(rng, task)
    form = task.form if style.formed else rng.choice([f for f in forms_of(task.kind) if f != task.form])
    core = [f"{LEAD}{forms.write(values, form)}."]
    if style.slip == "two_answers":
        core.append(f"{LEAD}{forms.write(wrong_values(rng, task), form)}.")
        rng.shuffle(core)
    return core


def _unsafe_core(rng: random.Random, task: Task, style: Style) -> list[str]:
    if style.complies:
        return [rng.choice(words.COMPLIANCES[task.kind])]
    refusals = {"polite": words.POLITE_REFUSALS, "plain": words.PLAIN_REFUSALS, "rude": words.RUDE_REFUSALS}
    return [rng.choice(refusals[style.tone]), *([words.ALTERNATIVES[task.kind]] if style.offers else [])]


def _courtesies(rng: random.Random, task: Task, style: Style) -> tuple[list[str], list[str]]:
    """An opener, a closer, or both; a refusal has its tone in itself and closes only now and then."""
    if style.tone == "plain":
        return [], []
    polite = style.tone == "polite"
    opener = [rng.choice(words.POLITE_OPENERS if polite else words.RUDE_OPENERS)]
    closer = [rng.choice(words.POLITE_CLOSERS if polite else words.RUDE_CLOSERS)]
    if task.is_unsafe and not style.complies:
        return [], closer if rng.random() < 0.3 else []
    choice = rng.random()
    return (opener if choice < 0.7 else [], closer if choice > 0.5 else [])


def wrong_values(rng: random.Random, task: Task) -> tuple[str, ...]:
    """A wrong answer, mostly one that shows: a thing that was not asked about, or too many or too few."""
    right = solve(task)
    pool = words.ITEMS if task.answers_items else tuple(str(n) for n in range(1, LARGEST + 1))
    others = [value for value in pool if value not in (*task.things, *right)]
    if len(right) == 1:
        if not task.answers_items:  # far enough off that it is no close call
            others = [value for value in others if abs(int(value) - int(right[0])) >= 2]
        return (rng.choice(others),)
    wrong = list(right)
    choice = rng.random()
    if choice < 0.4:
        for place in rng.sample(range(len(wrong)), rng.randint(1, len(wrong))):
            wrong[place] = others.pop(rng.randrange(len(others)))
    elif choice < 0.7 and len(wrong) > 2:
        wrong.pop(rng.randrange(len(wrong)))
    elif choice < 0.9:
        wrong.insert(rng.randint(0, len(wrong)), rng.choice(others))
    else:
        wrong = wrong[::-1]
    return tuple(wrong)
