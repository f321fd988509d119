"""Compares a candidate with the champion on the same prompts, decides, and records the decision."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from launch.evaluate.policy.evaluate import evaluate
from launch.lineage.command import artifact_folder
from launch.promote.plan import Plan, plan
from rlhf.errors import UserError
from rlhf.evaluation.gate import Check, Responses, decide
from rlhf.evaluation.statistics import Estimate
from rlhf.runs import artifacts
from rlhf.tracking import Registry, Version, is_reference

REFUSED = 7
CANDIDATE, CHAMPION = POLICIES = ("candidate", "champion")


def run(args: argparse.Namespace) -> int:
    registry = Registry(args.tracking_uri)
    if args.undo:
        return undo(registry, args.model)
    if args.model is None:
        raise UserError("name the MODEL to promote, or give --undo")
    candidate = find(registry, args.model)
    if candidate.tags.get("artifact.kind", "").startswith("reward/"):
        raise UserError(f"{candidate.uri} is a reward model; only policies are compared by their responses")
    require_whole(candidate)
    champion = registry.champion(candidate.name)
    if champion is None:
        registry.promote(candidate)
        registry.set_tags(candidate, {"gate.verdict": "promoted: there was no champion, so nothing was compared"})
        print(f"{candidate.uri} is the champion now. There was none before, so nothing was compared.")
        return 0
    if champion.number == candidate.number:
        print(f"{candidate.uri} is the champion already.")
        return 0
    require_whole(champion)
    planned = plan(candidate.path, candidate.tags["artifact.kind"], args.prompts, args.reward)
    return compare(registry, candidate, champion, planned, args.out or candidate.path.parent / "promotion")


def compare(registry: Registry, candidate: Version, champion: Version, planned: Plan, out: Path) -> int:
    policies = {CANDIDATE: str(candidate.path), CHAMPION: str(champion.path)}
    evaluate(policies, planned.prompts, planned.rewards, planned.settings, out)
    try:
        in_tokens = same_tokenizer(candidate.path, champion.path)
        checks = decide(*responses_of(out / "responses.jsonl", in_tokens), planned.reward)
    except ValueError as error:
        raise UserError(f"{out}: {error}", 3) from None
    failed = [check for check in checks if not check.passed]
    verdict = f"refused: {', '.join(check.name for check in failed)}" if failed else "promoted"
    record = {
        "verdict": verdict,
        "candidate": candidate.uri,
        "champion": champion.uri,
        "checks": checks_as_json(checks),
    }
    artifacts.write_json(out / "gate.json", record)
    registry.set_tags(candidate, tags_of(checks, verdict, champion, out))
    print(f"{candidate.uri} against {champion.uri}, {len(planned.prompts)} prompts:")
    print("\n".join(map(line, checks)))
    if failed:
        print(f"Not promoted: {', '.join(check.name for check in failed)}. {champion.uri} stays the champion.")
    else:
        registry.promote(candidate)
        print(f"{candidate.uri} is the champion now; `rlhf promote --undo` takes it back.")
    print(f"report: {out / 'report.html'}, gate.json")
    return REFUSED if failed else 0


def undo(registry: Registry, model: str | None) -> int:
    name = re.sub(r"^models:/|[/@][^/@]*$", "", model) if model else only(registry.names_with_champion())
    champion = registry.undo(name)
    print(f"{champion.uri} is the champion again." if champion else f"{name} has no champion any more.")
    return 0


def only(names: Sequence[str]) -> str:
    if len(names) != 1:
        there = f"champions of {', '.join(names)}; name one, as models:/NAME" if names else "no champion to take back"
        raise UserError(f"--undo: the registry has {there}", 2 if names else 4)
    return names[0]


def find(registry: Registry, model: str) -> Version:
    if is_reference(model):
        return registry.version(model)
    folder = artifact_folder(model)
    return registry.version_of(artifacts.load(folder).digest, folder)


def require_whole(version: Version) -> None:
    """UserError (4) unless the folder of a version still holds it."""
    found = artifacts.load(version.path)
    if found.digest != version.digest:
        raise UserError(
            f"{version.uri} was {version.digest[:12]} in {version.path}, which now holds {found.digest[:12]}: its weights "
            "are gone. Another version can be promoted after `rlhf promote --undo`, if this was the champion.",
            4,
        )


def same_tokenizer(a: Path, b: Path) -> bool:
    one, other = (folder / "tokenizer.json" for folder in (a, b))
    return one.is_file() and other.is_file() and artifacts.sha256_of(one) == artifacts.sha256_of(other)


def responses_of(file: Path, in_tokens: bool) -> tuple[Responses, Responses]:
    """Those of candidate and champion, where both responded, in the same order."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    of = {name: {(one["prompt"], one["sample"]): one for one in lines if one["model"] == name} for name in POLICIES}
    both = sorted(of[CANDIDATE].keys() & of[CHAMPION].keys())
    if not both:
        raise UserError(f"{file}: no prompt has a response from both policies", 3)
    candidate, champion = (_responses([of[name][key] for key in both], in_tokens) for name in POLICIES)
    return candidate, champion


def _responses(lines: Sequence[Mapping], in_tokens: bool) -> Responses:
    return Responses(
        prompts=[json.dumps(line["messages"]) for line in lines],
        tags=[line["tag"] for line in lines],
        texts=[line["response"] for line in lines],
        lengths=[line["length"] if in_tokens else len(line["response"]) for line in lines],
        scores={name: [line["scores"][name] for line in lines] for name in lines[0]["scores"]},
    )


def line(check: Check) -> str:
    mark = "passed" if check.passed else "FAILED"
    return f"  {mark}  {check.name}: {interval(check.value)} ({check.what})"


def interval(value: Estimate) -> str:
    return f"{value.value:+.3g} [{value.low:+.3g}, {value.high:+.3g}]"


def checks_as_json(checks: Sequence[Check]) -> dict[str, dict]:
    return {check.name: {key: value for key, value in asdict(check).items() if key != "name"} for check in checks}


def tags_of(checks: Sequence[Check], verdict: str, champion: Version, out: Path) -> dict[str, str]:
    values = {f"gate.{check.name}": interval(check.value) for check in checks}
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"verdict": verdict, "against": champion.uri, "report": str(out.absolute()), "time": when}
    return values | {f"gate.{key}": value for key, value in about.items()}
