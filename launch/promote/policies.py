"""Two policies on the same prompts, with the same random numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import reward_data
from launch.evaluate.policy.evaluate import evaluate
from launch.promote.compared import CANDIDATE, CHAMPION, Compared
from launch.promote.plan import plan
from launch.promote.trained_on import leave_out
from rlhf.errors import UserError
from rlhf.evaluation.gate import Responses, decide
from rlhf.runs import artifacts
from rlhf.tracking import Version


def compare(candidate: Version, champion: Version, args: argparse.Namespace, out: Path) -> Compared:
    if args.pairs:
        raise UserError(f"--pairs: {candidate.uri} is a policy; name prompts (--prompts FILE)")
    planned = plan(candidate.path, candidate.tags["artifact.kind"], args.prompts, args.reward)
    digests = {name: digest_of(name) for name in args.prompts or ()}
    prompts, notes = leave_out(planned.prompts, (candidate, champion), digests)
    planned = replace(planned, prompts=prompts)
    policies = {CANDIDATE: str(candidate.path), CHAMPION: str(champion.path)}
    evaluate(policies, planned.prompts, planned.rewards, planned.settings, out)
    try:
        in_tokens = same_tokenizer(candidate.path, champion.path)
        checks = decide(*responses_of(out / "responses.jsonl", in_tokens), planned.reward)
    except ValueError as error:
        raise UserError(f"{out}: {error}", 3) from None
    return Compared(checks, f"{len(prompts)} prompts", notes)


def digest_of(file: str) -> str:
    split = "held_out" if file == "shipped" else None
    return reward_data.load("prompts", reward_data.Source(file, split=split), bad_rows="skip").digest


def same_tokenizer(a: Path, b: Path) -> bool:
    one, other = (folder / "tokenizer.json" for folder in (a, b))
    return one.is_file() and other.is_file() and artifacts.sha256_of(one) == artifacts.sha256_of(other)


def responses_of(file: Path, in_tokens: bool) -> tuple[Responses, Responses]:
    """Those of candidate and champion, where both responded, in the same order."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    of = {
        name: {(one["prompt"], one["sample"]): one for one in lines if one["model"] == name}
        for name in (CANDIDATE, CHAMPION)
    }
    both = sorted(of[CANDIDATE].keys() & of[CHAMPION].keys())
    if not both:
        raise UserError(f"{file}: no prompt has a response from both policies", 3)
    candidate, champion = (_responses([own[key] for key in both], in_tokens) for own in of.values())
    return candidate, champion


def _responses(lines: Sequence[Mapping], in_tokens: bool) -> Responses:
    return Responses(
        prompts=[json.dumps(line["messages"]) for line in lines],
        tags=[line["tag"] for line in lines],
        texts=[line["response"] for line in lines],
        lengths=[line["length"] if in_tokens else len(line["response"]) for line in lines],
        scores={name: [line["scores"][name] for line in lines] for name in lines[0]["scores"]},
    )
