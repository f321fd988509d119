"""Writes the shipped files: `python -m reward_data.world.generate OUT --seed 0`. Same seed, same bytes."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from reward_data.records import Rating, Tag
from reward_data.world.answers import IDEAL, Style, write_answer
from reward_data.world.quality import gold_score
from reward_data.world.tasks import HELPFUL, UNSAFE, Task, draw_prompt, parse_prompt

SIZES = {
    "demonstrations": {"train": 6000, "held_out": 200},
    "preferences": {"train": 7500, "held_out": 1000},
    "prompts": {"train": 800, "held_out": 512},
}
UNSAFE_FRACTION = 0.4
HELD_OUT_FRACTION = 0.15  # of all possible prompts, by hash
IDEAL_FRACTION = 0.45  # of the demonstrations
WRONG_FRACTION = 0.05  # of the demonstrations
PAIRS = {  # how two answers differ
    "worse": 0.74,  # one has one to three defects more
    "any": 0.1,  # each has defects of its own
    "wrong": 0.05,  # helpful tasks: one is wrong, and nothing else
    "slip": 0.11,  # one has a slip
}
CLOSE_CALLS = 0.35  # share of the negligibly better pairs that are kept
RATINGS: tuple[tuple[float, Rating], ...] = ((0.5, "significantly"), (0.25, "better"), (0.1, "slightly"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the shipped world's files.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in generate(arguments.seed).items():
        (arguments.out / name).write_text(text, encoding="utf-8", newline="\n")


def generate(seed: int) -> dict[str, str]:
    """Text of every shipped file, by its name."""
    made = {"demonstrations": _demonstration, "preferences": _preference, "prompts": _prompt}
    texts = {}
    for kind, sizes in SIZES.items():
        for split, size in sizes.items():
            rng = random.Random(f"{seed}/{kind}/{split}")
            prompts = _prompts(rng, split, distinct=kind == "prompts" or split == "held_out")
            rows = (made[kind](rng, next(prompts)) for _ in range(size))
            texts[f"{kind}.{split}.jsonl"] = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    return texts


def rating_of(difference: float) -> Rating:
    """The rating for a difference of gold scores: .5 significantly, .25 better, .1 slightly, less negligibly."""
    for least, rating in RATINGS:
        if round(difference, 6) >= least:
            return rating
    return "negligibly"


def _prompts(rng: random.Random, split: str, distinct: bool) -> Iterator[str]:
    """Endless prompts of one split. A hash of its text decides where a prompt belongs, so no two splits share one."""
    seen = set()
    while True:
        kind = rng.choice(UNSAFE if rng.random() < UNSAFE_FRACTION else HELPFUL)
        prompt = draw_prompt(rng, kind)
        if (prompt in seen and distinct) or is_held_out(prompt) != (split == "held_out"):
            continue
        seen.add(prompt)
        yield prompt


def is_held_out(prompt: str) -> bool:
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_FRACTION


def _demonstration(rng: random.Random, prompt: str) -> dict[str, Any]:
    task = parse_prompt(prompt)
    style = IDEAL if rng.random() < IDEAL_FRACTION else _spoiled(rng, task, IDEAL)
    if rng.random() < WRONG_FRACTION:
        style = replace(style, right=False)
    answer = write_answer(rng, task, prompt, style)
    return {"messages": [_user(prompt), {"role": "assistant", "content": answer}], "tag": _tag(task)}


def _prompt(rng: random.Random, prompt: str) -> dict[str, Any]:
    return {"messages": [_user(prompt)], "tag": _tag(parse_prompt(prompt))}


def _preference(rng: random.Random, prompt: str) -> dict[str, Any]:
    task = parse_prompt(prompt)
    while True:
        styles = _two_styles(rng, task)
        texts = [write_answer(rng, task, prompt, style) for style in styles]
        scores = [gold_score(prompt, text) for text in texts]
        better = scores.index(max(scores))
        rating = rating_of(abs(scores[0] - scores[1]))
        if scores[0] != scores[1] and (rating != "negligibly" or rng.random() < CLOSE_CALLS):
            break
    return {
        "prompt": [_user(prompt)],
        "chosen": texts[better],
        "rejected": texts[1 - better],
        "rating": rating,
        "tag": _tag(task),
        "chosen_safety": _safety(styles[better]),
        "rejected_safety": _safety(styles[1 - better]),
    }


def _two_styles(rng: random.Random, task: Task) -> tuple[Style, Style]:
    """Mostly two manners of the same answer. Where the rightness differs too, it mostly speaks for the same side."""
    one = IDEAL if rng.random() < 0.4 else _spoiled(rng, task, IDEAL)
    match rng.choices(list(PAIRS), list(PAIRS.values()))[0]:
        case "slip":
            slips = ("again", "echo") if task.is_unsafe else ("again", "echo", "two_answers", "evasion")
            return one, replace(one, slip=rng.choice(slips))
        case "wrong" if not task.is_unsafe:
            return one, replace(one, right=False)
        case "any":
            return one, _spoiled(rng, task, IDEAL)
        case _:
            return one, replace(_spoiled(rng, task, one), right=rng.random() < 0.85)


def _spoiled(rng: random.Random, task: Task, style: Style) -> Style:
    """The style with one to three defects of manner more."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        style = rng.choice(_UNSAFE_DEFECTS if task.is_unsafe else _HELPFUL_DEFECTS)(rng, style)
    return style


def _rude(rng: random.Random, style: Style) -> Style:
    return replace(style, tone="rude")


def _plain(rng: random.Random, style: Style) -> Style:
    return replace(style, tone="plain" if style.tone == "polite" else style.tone)


def _rambling(rng: random.Random, style: Style) -> Style:
    return replace(style, fillers=min(3, style.fillers + rng.randint(1, 2)))


def _misformed(rng: random.Random, style: Style) -> Style:
    return replace(style, formed=False)


def _complying(rng: random.Random, style: Style) -> Style:
    return replace(style, complies=True)


def _without_offer(rng: random.Random, style: Style) -> Style:
    return replace(style, offers=False)


_HELPFUL_DEFECTS = (_rude, _plain, _rambling, _misformed)
_UNSAFE_DEFECTS = (_rude, _plain, _rambling, _complying, _complying, _without_offer)


def _user(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def _tag(task: Task) -> Tag:
    return "safety" if task.is_unsafe else "helpful"


def _safety(style: Style) -> str:
    return "unsafe" if style.complies else "safe"


if __name__ == "__main__":
    main()
