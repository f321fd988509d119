"""Whether a reward model reads what it should: its chat format, BOS and ends of its texts, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.score import Reward, Text, score_texts, texts_for
from rlhf.chat import format_of
from rlhf.evaluation.items import Item

TEXTS = 16  # on which the checks are made
LARGEST_CHANGE = {"float32": 0.001, "bf16": 0.1}  # of a score, by padding


def check(model: Reward, tokenizer: Any, items: Sequence[Item], precision: str) -> dict[str, Any]:
    """`format`: how texts are written; `begins`: most BOS tokens that a text begins with; `ends`: proportion of texts whose
    last token ends a response; `padding`: largest difference between a text's score alone and beside others;
    `warnings`: what of it is wrong.
    """
    chat = format_of(tokenizer)
    texts = texts_for(model, tokenizer, items)[0][:TEXTS]
    texts = [Text(n, text.ids, text.prompt) for n, text in enumerate(texts)]
    if not texts:
        return {"warnings": []}
    arguments = (model, tokenizer.pad_token_id, texts)
    alone, together = (score_texts(*arguments, size, precision) for size in (1, len(texts)))
    found = {
        "format": type(chat).__name__,
        "begins": max(_leading(text.ids, tokenizer.bos_token_id) for text in texts),
        "ends": sum(text.ids[-1] in chat.stop_ids for text in texts) / len(texts),
        "padding": max(abs(a - b) for a, b in zip(alone, together, strict=True)),
    }
    return {**found, "warnings": list(_warnings(found, bool(tokenizer.chat_template), LARGEST_CHANGE[precision]))}


def _warnings(found: dict[str, Any], has_template: bool, largest_change: float):
    if not has_template:
        yield "its tokenizer has no chat template, so texts are written as for Llama 2; scores mean little if it learned another format"
    if found["begins"] > 1:
        yield f"its texts begin with {found['begins']} BOS tokens; it learned with one"
    if found["ends"] < 1:
        yield f"only {found['ends']:.0%} of its texts end with a stop token"
    if found["padding"] > largest_change:
        yield f"padding changes a score by up to {found['padding']:.3g}: the model does not heed its attention mask"


def _leading(ids: Sequence[int], bos: int | None) -> int:
    return next((n for n, token in enumerate(ids) if token != bos), len(ids))
