"""PPO in the report: base, SFT and PPO model on held-out prompts, and where the time went."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import plots, profile_table
from launch.report.section import Metrics, Section, Table, flat, interval, nested, number, quoted
from rlhf.ppo import alarms
from rlhf.tracking import read_lines_of, read_metrics

POLICIES = ("base", "sft", "ppo")
SAMPLES = 10
CURVES = ("ppo/reward", "ppo/kl")


def _gather(folder: Path, metrics: Metrics) -> dict[str, Any]:
    own = metrics["ppo"]
    return {
        **{key: value for key, value in own.items() if key != "samples"},
        "held_out": {policy: nested(own["held_out"][policy]) for policy in POLICIES},
        "gain": nested(own["gain"]),
        "profile": profile_table.account(read_metrics(folder / "ppo")),
    }


def _drawings(found: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[], bytes]]]:
    return {"held_out": ("Base, SFT and PPO on held-out prompts", lambda: plots.held_out(_held_out(found)))}


def _held_out(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {policy: dict(flat(found["held_out"][policy])) for policy in POLICIES}


def _tables(found: Mapping[str, Any]) -> list[Table]:
    metrics = _held_out(found)
    names = dict.fromkeys(name for policy in POLICIES for name in metrics[policy])
    count = metrics["ppo"]["length"]["n"]
    responses = Table(
        f"Policies: rewards and other metrics of the responses to {count} held-out prompts",
        ("figure", *POLICIES),
        [
            (name.removeprefix("reward."), *(interval(metrics[policy].get(name)) for policy in POLICIES))
            for name in names
        ],
    )
    return [responses, *_profile(found)]


def _profile(found: Mapping[str, Any]) -> list[Table]:
    """Where the time and the tokens of PPO went; nothing where no iteration was recorded."""
    if not (account := found.get("profile")):
        return []
    machine = account["machine"]
    at_best = f"{machine['flops'] / 1e9:.0f} GFLOP/s, {machine['bandwidth'] / 1e9:.0f} GB/s"
    title = f"PPO: a mean iteration; the machine's limit: {at_best}"
    return [Table(title, profile_table.COLUMNS, profile_table.rows(account))]


def _facts(found: Mapping[str, Any]) -> list[str]:
    kept = f"{found['iterations']} iterations, number {found['best_iteration']} kept"
    gains = (f"{name.removeprefix('reward.')} {interval(gain)}" for name, gain in flat(found["gain"]))
    return [
        f"PPO: {kept}; KL to the SFT model {number(found['kl'])} nats per response",
        f"PPO less SFT, prompt by prompt: {', '.join(gains)}",
    ]


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """The alarms that sounded."""
    return [
        f"PPO, {alarms.line(entry)} (in {entry['iterations']} of {found['iterations']} iterations)"
        for entry in found.get("alarms", [])
    ]


def _headline(found: Mapping[str, Any]) -> dict[str, float]:
    """eval/<policy>/…"""
    return {
        f"eval/{policy}/{name.replace('.', '_')}": estimate["value"]
        for policy in POLICIES
        for name, estimate in flat(found["held_out"][policy])
    }


def _results(found: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {("ppo", name): estimate for name, estimate in flat(found["held_out"]["ppo"])}


def _curves(folder: Path) -> list[dict[str, float]]:
    return read_lines_of(folder / "ppo", CURVES)


def _appendix(metrics: Metrics) -> list[str]:
    """Prompts with their responses before and after."""
    samples = metrics["ppo"].get("samples", [])
    lines = ["", "## Held-out prompts, answered before and after PPO"] if samples else []
    for place, sample in enumerate(samples[:SAMPLES], 1):
        lines += ["", f"### {place}", "", *quoted("Prompt", sample["prompt"])]
        for policy in ("sft", "ppo"):
            scores = ", ".join(
                f"{key.removesuffix(f'_{policy}')} {'failed' if value is None else f'{value:.2f}'}"
                for key, value in sample.items()
                if key.endswith(f"_{policy}")
            )
            lines += quoted(f"{policy}: {scores}" if scores else policy, sample[policy])
    return lines


SECTION = Section(_gather, _tables, _facts, _warnings, _headline, _results, _curves, _drawings, _appendix)
