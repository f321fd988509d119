"""The cost model of `rlhf plan` beside runs of PPO on 1, 2 and 3 pseudo-nodes: `sudo python -m benchmarks.growth_runs`.

Every node has one worker with one thread; rows and steps are those of one worker. The rates come from the runs (matrix
products, copies) and from `rlhf doctor` (all-reduce of 4 MB between all nodes). The fraction of them that each phase
reaches is fitted to the run of one node; the seconds of two and three are predictions. Where the machine has fewer cores
than there are nodes, they share them, and the prediction does too.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.plan import tables
from launch.settings import load
from launch.testbed import Testbed
from rlhf.config import RunConfig
from rlhf.planning import cost_of, plan_run, shape_of
from rlhf.planning.machines import Machine
from rlhf.tracking import read_metrics

PHASES = ("sync", "sampling", "scoring", "update")
NODES = (1, 2, 3)
RATE = re.compile(r"of 4 MB at (\d+) MB/s")

RUN = """
name: growth
model: {path: tiny, tiny: {vocab_size: 512, hidden_size: 384, intermediate_size: 1024, layers: 8, heads: 6}}
hardware: {workers: 1, workers_per_reward_model: 1}
data:
  gold: shipped
  demonstrations: {train: [{path: shipped, limit: 24}], held_out: [{path: shipped, split: held_out, limit: 8}]}
  preferences: {train: [{path: shipped, limit: 48}], held_out: [{path: shipped, split: held_out, limit: 8}]}
  prompts: {train: [{path: shipped, limit: 48}], held_out: [{path: shipped, split: held_out, limit: 16}]}
sft: {epochs: 1, batch_size: 12, micro_batch_size: 4, max_length: 128, evals: 1, checkpoints: 1, optim: {lr: 1e-4}}
reward: {epochs: 1, batch_size: 12, micro_batch_size: 4, max_length: 128, evals: 1, checkpoints: 1, center_rows: 8, optim: {lr: 1e-4}}
ppo:
  iterations: 5
  batch_size: 48
  minibatch_size: 24
  max_prompt_length: 64
  sampling: {max_new_tokens: 48}
  eval_every: 5
  eval_prompts: 4
  checkpoint_every: 5
  optim: {lr: 1e-6}
  critic_optim: {lr: 1e-6}
tracking: {uri: null}
"""


def machine_of(flops: float, bandwidth: float, network: float) -> Machine:
    """A node with one worker."""
    return Machine("pseudo-node", 0, 0.0, 8e9, flops, bandwidth, network, bandwidth, network)


def predicted(config: RunConfig, machine: Machine) -> dict[str, float]:
    """Seconds of the phases of an iteration, before the fractions are fitted."""
    shape = shape_of(config.model)
    assert shape is not None
    cost = cost_of(config, shape, machine, plan_run(config, shape, machine).of("ppo"))
    assert cost is not None
    return cost.seconds


def apart(config: RunConfig, machine: Machine) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of arithmetic and memory, and those in which weights and gradients are under way."""
    whole = predicted(config, machine)
    alone = predicted(config, machine.with_endless_network())
    return alone, {phase: whole[phase] - alone[phase] for phase in whole}


def grown(fitted: Mapping[str, float], config: RunConfig, machine: Machine, share: float) -> dict[str, float]:
    """Seconds of every phase. `fitted`: measured seconds of a phase on one node by those of the model. `share`: how many
    workers share a core."""
    alone, moving = apart(config, machine)
    return {phase: fitted[phase] * share * alone[phase] + moving[phase] for phase in PHASES}


def measured(folder: Path) -> dict[str, float]:
    """Medians over the iterations but the first."""
    found = read_metrics(folder / "ppo")

    def median(name: str) -> float:
        return statistics.median(value for step, value in found[name] if step > 0)

    return {phase: median(f"perf/seconds_{phase}") for phase in PHASES} | {
        "flops": median("perf/machine_flops"),
        "bandwidth": median("perf/machine_bandwidth"),
    }


def run(testbed: Testbed, nodes: int) -> dict[str, float]:
    name = f"growth-{nodes}"
    _rlhf(testbed, "run", _settings_of(testbed, nodes), "--name", name)
    return measured(testbed.shared / "runs" / name)


def network_rate(testbed: Testbed, nodes: int) -> float:
    """Bytes/s of an all-reduce between all nodes, as `rlhf doctor` measures it."""
    rates = RATE.findall(_rlhf(testbed, "doctor", _settings_of(testbed, nodes)))
    return min(map(float, rates)) * 1e6


def _settings_of(testbed: Testbed, nodes: int) -> list[str]:
    workers = ["--hardware.workers", str(nodes), "--hardware.ray_address", testbed.address]
    return [str(testbed.shared / "growth.yaml"), *workers]


def _rlhf(testbed: Testbed, command: str, words: Sequence[str], *more: str) -> str:
    process = testbed.popen(
        1,
        [sys.executable, "-m", "launch.cli", command, *words, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    shown, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"rlhf {command} on {testbed.nodes()} ended with {process.returncode}:\n{shown[-3000:]}")
    return shown


def rows(
    config_of: Mapping[int, RunConfig],
    found: Mapping[int, Mapping[str, float]],
    network: Mapping[int, float],
    cores: int,
) -> list[list[str]]:
    """A line for every phase on every number of nodes, and one for their sum."""
    one = found[1]
    alone, _ = apart(config_of[1], machine_of(one["flops"], one["bandwidth"], math.inf))
    fitted = {phase: one[phase] / alone[phase] for phase in PHASES}
    lines = []
    for nodes, was in found.items():
        machine = machine_of(one["flops"], one["bandwidth"], network.get(nodes, math.inf))
        seconds = grown(fitted, config_of[nodes], machine, max(1.0, nodes / cores))
        pairs = {phase: (was[phase], seconds[phase]) for phase in PHASES}
        pairs["all"] = sum(was[phase] for phase in PHASES), sum(seconds.values())
        for phase, (real, model) in pairs.items():
            error = "fitted" if nodes == 1 else f"{model / real - 1:+.0%}"
            lines.append([str(nodes), phase, f"{real:.2f}", f"{model:.2f}", error])
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "rlhf-growth"))
    args = parser.parse_args(argv)
    found, network = {}, {}
    with Testbed(args.folder).up(max(NODES)) as testbed:
        (testbed.shared / "growth.yaml").write_text(RUN)
        for nodes in NODES:
            found[nodes] = run(testbed, nodes)
            print(nodes, found[nodes], flush=True)
        for nodes in NODES[1:]:
            network[nodes] = network_rate(testbed, nodes)
        config_of = {
            nodes: load(str(testbed.shared / "growth.yaml"), ["--hardware.workers", str(nodes)]) for nodes in NODES
        }
    print(f"network: {network}")
    print(
        tables.aligned(
            ["nodes", "phase", "seconds", "rlhf plan", "error"], rows(config_of, found, network, os.cpu_count() or 1)
        )
    )


if __name__ == "__main__":
    main()
