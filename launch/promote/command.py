"""Compares a candidate with the champion on the same data, decides, and records the decision."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launch.lineage.command import artifact_folder
from launch.promote import policies, reward_models
from launch.promote.compared import Compared
from rlhf.errors import UserError
from rlhf.evaluation.gate import Check
from rlhf.evaluation.statistics import Estimate
from rlhf.runs import artifacts
from rlhf.tracking import Registry, Version, is_reference

REFUSED = 7


def run(args: argparse.Namespace) -> int:
    registry = Registry(args.tracking_uri)
    if args.undo:
        return undo(registry, args.model)
    if args.model is None:
        raise UserError("name the MODEL to promote, or give --undo")
    candidate = find(registry, args.model)
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
    kind, out = candidate.tags["artifact.kind"], args.out or candidate.path.parent / "promotion"
    compare = reward_models.compare if kind.startswith("reward/") else policies.compare
    return conclude(registry, candidate, champion, compare(candidate, champion, args, out), out)


def conclude(registry: Registry, candidate: Version, champion: Version, compared: Compared, out: Path) -> int:
    """Records the decision and shows it; the exit code."""
    checks = compared.checks
    failed = [check for check in checks if not check.passed]
    verdict = f"refused: {', '.join(check.name for check in failed)}" if failed else "promoted"
    record = {
        "verdict": verdict,
        "candidate": candidate.uri,
        "champion": champion.uri,
        "notes": list(compared.notes),
        "checks": checks_as_json(checks),
    }
    artifacts.write_json(out / "gate.json", record)
    registry.set_tags(candidate, tags_of(checks, verdict, champion, out))
    print(f"{candidate.uri} against {champion.uri}, {compared.on}:")
    print("".join(f"  {note}\n" for note in compared.notes), end="")
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
