"""Two reward models on the same held-out pairs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import reward_data
from launch.evaluate.inputs import Inputs
from launch.evaluate.reward import Options, evaluate
from launch.promote.compared import CANDIDATE, CHAMPION, Compared
from launch.promote.plan import settings_of
from launch.promote.trained_on import leave_out
from reward_data import Preference
from rlhf.config import RunConfig
from rlhf.data import parsed
from rlhf.errors import UserError
from rlhf.evaluation.pairs import pairs_of
from rlhf.evaluation.reward_gate import decide
from rlhf.runs.artifacts import write_atomic
from rlhf.tracking import Version

BATCH_SIZE = 32


def compare(candidate: Version, champion: Version, args: argparse.Namespace, out: Path) -> Compared:
    if args.prompts or args.reward:
        option = "--prompts" if args.prompts else "--reward"
        raise UserError(f"{option}: {candidate.uri} is a reward model, which is compared on pairs (--pairs FILE)")
    config = settings_of(candidate.path, candidate.tags["artifact.kind"])
    rows, digests = given(args.pairs) if args.pairs else (held_out(config), {})
    kept, notes = leave_out(rows, (candidate, champion), digests)
    inputs = Inputs({CANDIDATE: candidate.path, CHAMPION: champion.path}, [write(out / "pairs.jsonl", kept)])
    options = Options(BATCH_SIZE, "float32", "skip", train=(), tracking_uri=None)
    _, scores = evaluate(inputs, out, options, anew=True)
    lines = [{line["row"]: line for line in scores.lines(name)} for name in (CANDIDATE, CHAMPION)]
    both = sorted(lines[0].keys() & lines[1].keys())
    if not both:
        raise UserError(f"{out}: no pair has a score from both reward models", 3)
    own, other = (pairs_of(of_model[row] for row in both) for of_model in lines)
    name = candidate.tags["artifact.kind"].removeprefix("reward/")
    return Compared(decide(own, other, config.reward.models[name].own_tag), f"{len(both)} pairs", notes)


def given(files: Sequence[str]) -> tuple[list[Preference], dict[str, str]]:
    """The pairs of the files, and the files' digests. DataError (3) for a bad row."""
    rows, digests = [], {}
    for file in files:
        split = "held_out" if file == "shipped" else None
        loaded = reward_data.load("preferences", reward_data.Source(file, split=split))
        rows += loaded.rows
        digests[file] = loaded.digest
    return rows, digests


def held_out(config: RunConfig) -> list[Preference]:
    file = parsed.held_out_file(config, "preferences")
    if not file.exists():
        raise UserError(f"{file} does not exist: name the pairs (--pairs FILE)", 4)
    return parsed.read_rows(file, "preferences")


def write(file: Path, rows: Sequence[Preference]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
    return file
