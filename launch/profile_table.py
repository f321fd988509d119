"""The step profile of a PPO stage: the perf/ figures of all its iterations as one account, for the report.

docs/metrics.md defines the figures; the stage takes them in rlhf/ppo/step_profiler.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("useful", "prompt", "padded", "dropped")
COLUMNS = ("phase", "seconds", "time %", "tokens/s", "useful %", "waste %", "limit %", "GB")  # fit a terminal of 80

Series = Mapping[str, Sequence[tuple[int, float]]]


def account(series: Series) -> dict[str, Any]:
    """Means per iteration, over the iterations whose time was taken to the end; speeds and shares weigh by seconds.

    `series`: (step, value) by metric. Empty where none was recorded.
    """
    of_step = {name: dict(points) for name, points in series.items() if name.startswith("perf/")}
    steps = sorted(of_step.get("perf/seconds_iteration", {}))
    if not steps:
        return {}

    def values(name: str) -> list[float]:
        return [of_step[f"perf/{name}"].get(step, 0.0) for step in steps] if f"perf/{name}" in of_step else []

    whole = sum(values("seconds_iteration"))
    names = [name.removeprefix("perf/seconds_") for name in of_step if name.startswith("perf/seconds_")]
    phases = {phase: _phase(values, phase, whole, len(steps)) for phase in names if phase != "iteration"}
    machine = {name: _mean(values(f"machine_{name}")) for name in ("flops", "bandwidth")}
    return {"iterations": len(steps), "seconds": whole / len(steps), "machine": machine, "phases": phases}


def rows(profile: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line per phase, and one for the whole iteration; under `COLUMNS`."""
    lines = [_line(phase, metrics) for phase, metrics in profile["phases"].items()]
    return [*lines, ("iteration", f"{profile['seconds']:.3g}", "100.0", *[""] * (len(COLUMNS) - 3))]


def _phase(values: Any, phase: str, whole: float, count: int) -> dict[str, Any]:
    seconds = values(f"seconds_{phase}")
    total = sum(seconds)
    metrics: dict[str, Any] = {"seconds": total / count, "fraction": total / whole}
    beside = values(f"overlapped_seconds_{phase}") or [0.0] * count
    if sum(beside):
        metrics["overlapped"] = sum(beside) / count
    worked = [inside + more for inside, more in zip(seconds, beside, strict=True)]
    if memory := values(f"memory_{phase}"):
        metrics["memory"] = max(memory)
    tokens = {kind: sum(values(f"tokens_{phase}_{kind}")) for kind in KINDS}
    if sum(tokens.values()) and sum(worked):
        metrics["tokens"] = {kind: number / count for kind, number in tokens.items()}
        metrics["token_efficiency"] = tokens["useful"] / sum(tokens.values())
        metrics["tokens_per_second"] = (tokens["useful"] + tokens["prompt"]) / sum(worked)
        for name in ("mfu", "roofline_fraction"):
            weighted = zip(values(f"{name}_{phase}"), worked, strict=True)
            metrics[name] = sum(share * taken for share, taken in weighted) / sum(worked)
    return metrics


def _line(phase: str, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    start = (phase, f"{metrics['seconds']:.3g}", f"{100 * metrics['fraction']:.1f}")
    memory = f"{metrics['memory'] / 1e9:.2f}" if "memory" in metrics else ""
    if "tokens" not in metrics:
        return (*start, *[""] * (len(COLUMNS) - 4), memory)
    tokens = metrics["tokens"]
    wasted = (tokens["padded"] + tokens["dropped"]) / sum(tokens.values())
    shares = (f"{100 * share:.0f}" for share in (metrics["token_efficiency"], wasted, metrics["roofline_fraction"]))
    return (*start, f"{metrics['tokens_per_second']:.0f}", *shares, memory)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
