"""All checks, in order."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.doctor import network, nodes, room, services, storage
from launch.doctor.examiner import Examiners
from launch.doctor.result import CheckResult
from launch.preflight import bytes_wanted
from rlhf.config import RunConfig

START_S = 45.0  # in which a process on a node must be there and have looked around
ANSWER_S = 15.0
TALK_S = 8.0


def examine_nodes(config: RunConfig, thorough: bool) -> Iterator[CheckResult]:
    """The nodes of the cluster that this process is connected with. Not `thorough`: what takes a second or two."""
    examiners = Examiners(config)
    folder = config.runs_dir / f".doctor-{secrets.token_hex(4)}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if thorough:
            yield from room.judge(config, examiners.resources)
        facts = examiners.ask(lambda name, actor: actor.facts.remote(folder), START_S)
        yield from _without(examiners, facts)
        if facts:
            yield from nodes.compare(facts, bytes_wanted(config), config.hardware.gpus_per_worker > 0)
            yield from nodes.clocks({name: _skew(examiners.actor(name)) for name in examiners.names})
            yield from _storage(examiners, folder)
        if facts and thorough:
            reached = examiners.ask(lambda name, actor: actor.reach.remote(), START_S)
            yield from _without(examiners, reached)
            yield from services.tracking(config, reached)
            yield from _network(examiners)
    finally:
        examiners.close()
        shutil.rmtree(folder, ignore_errors=True)


def _without(examiners: Examiners, answers: dict[str, Any]) -> Iterator[CheckResult]:
    """Takes nodes that gave no answer out of `answers` and of those that are asked, and says why."""
    for name, answer in list(answers.items()):
        if isinstance(answer, Exception):
            del answers[name]
            examiners.drop(name)
            yield _silent(name, answer)


def _silent(name: str, error: Exception) -> CheckResult:
    cause = getattr(error, "cause", None) or error
    text = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
    if isinstance(cause, TimeoutError):
        return CheckResult(
            "node", name, "failed", text, "see whether it is up and reached; `ray status` shows what Ray sees"
        )
    if isinstance(cause, OSError):
        remedy = "make runs_dir writable there, on storage that all nodes share"
        return CheckResult("storage", name, "failed", f"runs_dir cannot be used: {text}", remedy)
    return CheckResult(
        "node", name, "failed", text, "install the same revision of this project there, with its packages"
    )


def _skew(actor: Any) -> tuple[float, float]:
    """Seconds that a node's clock is ahead, and the error of that; from the quickest of five calls."""
    import ray

    measured = []
    for _ in range(5):
        before = time.time()
        there: Any = ray.get(actor.now.remote(), timeout=ANSWER_S)
        after = time.time()
        measured.append(((after - before) / 2, there - (before + after) / 2))
    exactness, skew = min(measured)
    return skew, exactness


def _storage(examiners: Examiners, folder: Path) -> Iterator[CheckResult]:
    files = {name: f"node-{number}" for number, name in enumerate(examiners.names)}
    rounds = []
    for text in ("new", "replaced"):
        written = examiners.ask(lambda name, actor, text=text: actor.write.remote(folder, files[name], text), ANSWER_S)
        yield from _without(examiners, written)
        names = [files[name] for name in examiners.names]
        seen = examiners.ask(
            lambda name, actor, text=text, names=names: actor.read.remote(folder, names, text), ANSWER_S
        )
        yield from _without(examiners, seen)
        writers = {file: name for name, file in files.items()}
        rounds.append({reader: {writers[f]: s for f, s in answer.items()} for reader, answer in seen.items()})
    yield from storage.judge(rounds, folder.parent)


def _network(examiners: Examiners) -> Iterator[CheckResult]:
    names = examiners.names
    if len(names) < 2:
        return
    stores = examiners.ask(lambda name, actor: actor.serve.remote(), ANSWER_S)
    yield from _without(examiners, stores)
    pairs: dict[tuple[str, str], network.Timing | str] = {}
    for number, together in enumerate(network.rounds(examiners.names)):
        calls = {
            (pair, rank): examiners.actor(name).all_reduce.remote(stores[pair[0]], f"{number}", rank, 2, TALK_S)
            for pair in together
            for rank, name in enumerate(pair)
        }
        answers = examiners.ask_some(calls, 2 * TALK_S + ANSWER_S)
        pairs |= {pair: _timing([answers[pair, rank] for rank in (0, 1)]) for pair in together}
    everyone = None
    if len(examiners.names) > 2 and not any(isinstance(found, str) for found in pairs.values()):
        first, *_ = everybody = examiners.names
        calls = {
            name: examiners.actor(name).all_reduce.remote(stores[first], "all", rank, len(everybody), TALK_S)
            for rank, name in enumerate(everybody)
        }
        everyone = _timing(list(examiners.ask_some(calls, 2 * TALK_S + ANSWER_S).values()))
    yield from network.judge(pairs, everyone)


def _timing(answers: list[Any]) -> network.Timing | str:
    """The slowest of the ranks, or why one failed."""
    for answer in answers:
        if isinstance(answer, Exception):
            cause = getattr(answer, "cause", None) or answer
            return " ".join(str(cause).partition(", keys:")[0].split())[:160]
    return max(answer[0] for answer in answers), min(answer[1] for answer in answers)
