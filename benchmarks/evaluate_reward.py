"""`rlhf evaluate reward` against a bare transformers loop on the same pairs: rows per second, and equal scores.

    python -m benchmarks.evaluate_reward --model REWARD_MODEL --pairs 512 --out evaluate_reward.json

Ours is what the command does between opening a model and making the report: it reads and checks all pairs, reads them
again, encodes, scores, and writes the scores. The bare loop reads JSON lines, renders the tokenizer's chat template,
tokenizes a window of pairs at once, and calls AutoModelForSequenceClassification on batches of the same size in the
same order.

CPU seconds are those of all threads: on a shared machine they vary less than those of the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.shapes import given_or_random
from benchmarks.turns import device_of, in_turns, parser_of, report, table
from launch.evaluate.reward import count_entries, entries
from launch.evaluate.scorers import ModelScorer
from launch.evaluate.scores import WINDOW, ScoreFile
from reward_data.load import SHIPPED
from rlhf.errors import UserError
from rlhf.models import ScalarModel, load_causal, load_tokenizer
from rlhf.profiling.roofline import measure

TOLERANCE = {"float32": 1e-3, "bf16": 0.1}  # of a score: two programs sum in another order


class Turn(NamedTuple):
    seconds: float
    cpu_seconds: float
    scores: list[float]  # of the responses, in the order of the file


def timed(side: Callable[[], list[float]]) -> Turn:
    start, cpu = time.perf_counter(), time.process_time()
    scores = side()
    return Turn(time.perf_counter() - start, time.process_time() - cpu, scores)


def ours(scorer: ModelScorer, file: Path) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        count_entries([file], "refuse")
        scores = ScoreFile(Path(folder) / "scores.jsonl", "benchmark")
        scores.fill("model", partial(entries, [file]), lambda: scorer, "refuse", lambda n: None)
        return [score for line in scores.lines("model") for score in line["scores"]]


def bare(model: Any, tokenizer: Any, file: Path, batch_size: int, precision: str) -> list[float]:
    scores: list[float] = []
    with file.open() as lines:
        while window := [json.loads(line) for line in islice(lines, WINDOW)]:
            dialogues = [
                [*row["prompt"], {"role": "assistant", "content": row[side]}]
                for row in window
                for side in ("chosen", "rejected")
            ]
            texts = tokenizer.apply_chat_template(dialogues, tokenize=False)
            scores += score_window(model, tokenizer, texts, batch_size, precision)
    return scores


@torch.inference_mode()
def score_window(model: Any, tokenizer: Any, texts: list[str], batch_size: int, precision: str) -> list[float]:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda n: -len(ids[n]))
    scores = [0.0] * len(ids)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[n] for n in part]}, return_tensors="pt").to(model.device)
            for n, logit in zip(part, model(**batch).logits[:, 0].float().tolist(), strict=True):
                scores[n] = logit
    return scores


def shipped_pairs(count: int) -> Iterator[str]:
    """Lines of shipped pairs, from the start again where there are not enough."""
    lines = [line for file in sorted(SHIPPED.glob("preferences.*.jsonl")) for line in file.open()]
    return islice(cycle(lines), count)


def reward_model(args: argparse.Namespace, folder: Path) -> Path:
    """The given model, or one of random weights."""
    if args.model:
        return Path(args.model).absolute()
    base = given_or_random(None, "tiny" if args.quick else args.shape, folder)
    causal: Any = load_causal(base)
    head_1H = torch.randn(1, causal.config.hidden_size, generator=torch.Generator().manual_seed(0))
    ScalarModel(causal.model, head_1H).save(folder / "reward", load_tokenizer(base))
    return folder / "reward"


def largest_difference(ours: Sequence[float], bare: Sequence[float], offset: float, tolerance: float) -> float:
    """Of the scores of both sides. UserError (6) if they do not compute the same."""
    worst = max(abs(a - (b - offset)) for a, b in zip(ours, bare, strict=True))
    if worst > tolerance:
        raise UserError(f"the two sides do not compute the same: scores differ by up to {worst:.3g}", 6)
    return worst


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, file = reward_model(args, folder), folder / "pairs.jsonl"
    file.write_text("".join(shipped_pairs(args.pairs)))
    scorer, device = ModelScorer(model, args.batch_size, args.precision), device_of(args.device)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    classifier, tokenizer = classifier.to(device).eval(), AutoTokenizer.from_pretrained(model)
    sides = {
        "bare": lambda: timed(partial(bare, classifier, tokenizer, file, args.batch_size, args.precision)),
        "ours": lambda: timed(partial(ours, scorer, file)),
    }
    in_turns(sides, 1)  # warm-up
    flops = measure(device, args.precision).flops
    turns = in_turns(sides, args.repeats)
    offset = getattr(classifier.config, "reward_offset", 0.0)
    difference = largest_difference(turns["ours"][0].scores, turns["bare"][0].scores, offset, TOLERANCE[args.precision])
    ratios = {
        field: statistics.median(
            getattr(b, field) / getattr(a, field) for a, b in zip(turns["ours"], turns["bare"], strict=True)
        )
        for field in ("seconds", "cpu_seconds")
    }
    return {
        "pairs": args.pairs,
        "batch_size": args.batch_size,
        "gflops": flops / 1e9,
        "pairs_per_second": {name: [args.pairs / turn.seconds for turn in found] for name, found in turns.items()},
        "cpu_seconds": {name: [turn.cpu_seconds for turn in found] for name, found in turns.items()},
        "ratio": ratios,
        "scores_differ_by": difference,
    }


def shown(result: dict[str, Any]) -> str:
    head = [
        "pairs",
        "bare loop, pairs/s",
        "ours, pairs/s",
        "ours / bare",
        "by CPU seconds",
        "scores differ by",
        "GFLOP/s",
    ]
    rates = {name: statistics.median(values) for name, values in result["pairs_per_second"].items()}
    row = [
        str(result["pairs"]),
        f"{rates['bare']:.3g}",
        f"{rates['ours']:.3g}",
        f"{result['ratio']['seconds']:.2f}",
        f"{result['ratio']['cpu_seconds']:.2f}",
        f"{result['scores_differ_by']:.0e}",
        f"{result['gflops']:.0f}",
    ]
    return table(head, [row])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of("evaluate_reward", __doc__, repeats=3)
    parser.add_argument("--pairs", type=int, default=512, help="(default 512)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts at once (default 16)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args, Path(folder))
    report(args, result, shown(result))
    return result


if __name__ == "__main__":
    main()
