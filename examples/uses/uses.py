"""Four uses of a model that `rlhf serve MODEL` serves: support chat, summaries, sentiment, stories.

    python examples/uses/uses.py summary < report.txt

The system prompts lie beside this file. RLHF_SERVE_TOKEN holds the token.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

LABELS = ("positive", "negative", "neutral")
PART = 4000  # characters of a text that are read at once


def messages(use: str, *turns: dict) -> list[dict]:
    system = (Path(__file__).parent / f"{use}.txt").read_text(encoding="utf-8").strip()
    return [{"role": "system", "content": system}, *turns]


def respond(client: OpenAI, use: str, *turns: dict, **settings) -> str:
    asked = {"model": client.models.list().data[0].id, "messages": messages(use, *turns)}
    return client.chat.completions.create(**asked, **settings).choices[0].message.content


def support(client: OpenAI, dialogue: list[dict], question: str) -> str:
    """The next reply; `dialogue` keeps what was said."""
    dialogue.append({"role": "user", "content": question})
    reply = respond(client, "support", *dialogue, temperature=0.3, max_tokens=200)
    dialogue.append({"role": "assistant", "content": reply})
    return reply


def summary(client: OpenAI, text: str) -> str:
    """A long text is summarised in parts, and these summaries once more."""
    parts = [text[at : at + PART] for at in range(0, len(text), PART)]
    short = [
        respond(client, "summary", {"role": "user", "content": one}, temperature=0, max_tokens=160) for one in parts
    ]
    return short[0] if len(short) == 1 else summary(client, "\n".join(short)[: PART * len(parts) // 2])


def sentiment(client: OpenAI, text: str) -> dict[str, float]:
    """The probability of each label, from the logprobs of the first token."""
    asked = {
        "model": client.models.list().data[0].id,
        "messages": messages("sentiment", {"role": "user", "content": text}),
    }
    found = client.chat.completions.create(**asked, temperature=0, max_tokens=1, logprobs=True, top_logprobs=20)
    weight = dict.fromkeys(LABELS, 1e-9)
    for token in found.choices[0].logprobs.content[0].top_logprobs:
        begins = [label for label in LABELS if token.token.strip() and label.startswith(token.token.strip().lower())]
        for label in begins:
            weight[label] += math.exp(token.logprob) / len(begins)
    return {label: weight[label] / sum(weight.values()) for label in LABELS}


def story(client: OpenAI, beginning: str) -> Iterator[str]:
    """Pieces of the story as they are made."""
    asked = {
        "model": client.models.list().data[0].id,
        "messages": messages("story", {"role": "user", "content": beginning}),
    }
    for chunk in client.chat.completions.create(**asked, temperature=0.9, top_p=0.95, max_tokens=400, stream=True):
        yield chunk.choices[0].delta.content or ""


def main(use: str, url: str = "http://127.0.0.1:8000/v1") -> None:
    client, dialogue = OpenAI(base_url=url, api_key=os.environ["RLHF_SERVE_TOKEN"]), []
    if use == "support":
        for line in sys.stdin:
            print(support(client, dialogue, line.strip()), flush=True)
    elif use == "summary":
        print(summary(client, sys.stdin.read()))
    elif use == "sentiment":
        print("  ".join(f"{label} {p:.2f}" for label, p in sentiment(client, sys.stdin.read().strip()).items()))
    elif use == "story":
        for piece in story(client, sys.stdin.read().strip()):
            print(piece, end="", flush=True)
        print()
    else:
        sys.exit(f"{use}: choose support, summary, sentiment or story")


if __name__ == "__main__":
    main(*sys.argv[1:])
