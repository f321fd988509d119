"""Small policies, rewards and prompts, and the command that evaluates them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from launch import cli
from rlhf.config import TinyConfig
from rlhf.models import ScalarModel, save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama

TEXTS = ["what is 2 + 2? it is 4", "sort the words: pear, apple. apple, pear", "say hello. hello!"] * 20
SIZE = TinyConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2)
REWARDS = """
def words(prompts, responses):
    return [len(response.split()) for response in responses]

def ended(responses, finished):
    return [float(done) for done in finished]

def half(responses):
    return [None if n % 2 else 1.0 for n in range(len(responses))]

def asks(responses, answer):
    return [0.0 for _ in responses]
"""
ROWS = [
    {"messages": [{"role": "user", "content": f"question {n}"}], "tag": ("helpful", "safety")[n % 2]} for n in range(12)
]


def make_folders(root: Path) -> dict[str, str]:
    """Two policies and a reward model with random weights, and a file of functions."""
    tokenizer = train_tokenizer(TEXTS, 300)
    found = {name: str(root / name) for name in ("one", "two", "reward")}
    for seed, name in enumerate(("one", "two")):
        save_causal(untrained_llama(SIZE, tokenizer, seed), found[name], tokenizer)
    head_1H = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    ScalarModel(untrained_llama(SIZE, tokenizer, 5).base_model, head_1H).save(found["reward"], tokenizer)
    (root / "mine.py").write_text(REWARDS)
    write(root / "prompts.jsonl", ROWS)
    return found | {"code": str(root / "mine.py"), "prompts": str(root / "prompts.jsonl")}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(*arguments: object, uri: str = "null") -> int:
    shown = ["evaluate", "policy", *map(str, arguments), "--max-new-tokens", "8", "--tracking-uri", uri]
    return cli.main(shown)


def read(out: Path) -> tuple[dict, list[dict]]:
    lines = (out / "responses.jsonl").read_text().splitlines()
    return json.loads((out / "report.json").read_text()), [json.loads(line) for line in lines]
