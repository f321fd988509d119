"""From the arguments of `rlhf plan` to its output and exit code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from launch.plan import growth, tables
from launch.plan.machine import machine_for
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.planning import Cost, ModelShape, RunPlan, cost_of, machine_named, nearest_change, plan_run, shape_of

CANNOT = 5


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    config = load(args.runfile, overrides)
    shape = _shape(config)
    if args.nodes is not None and len(args.nodes) > 1:
        return _grow(args, overrides, config, shape)
    if args.nodes is not None:
        config = _on_nodes(args, overrides, config, args.nodes[0])
    machine = machine_for(config.hardware, args.gpu)
    plan = plan_run(config, shape, machine)
    costs = [cost for stage in plan.stages if (cost := cost_of(config, shape, machine, stage))]
    change = None if plan.fits else nearest_change(config, shape, machine)
    if args.json:
        print(json.dumps(tables.as_json(plan, costs, change), indent=1))
    else:
        _show(config, shape, plan, costs, args.price)
        print(tables.verdict(plan, change))
    return 0 if plan.fits else CANNOT


def _show(config: RunConfig, shape: ModelShape, plan: RunPlan, costs: Sequence[Cost], price: float | None) -> None:
    nodes = f"{plan.nodes} × " if plan.nodes > 1 else ""
    print(f"{config.name}: {shape.parameters / 1e9:.3g}B parameters on {nodes}{plan.machine.name}\n")
    for stage in plan.stages:
        print(tables.memory(plan, stage), end="\n\n")
    if costs:
        print(tables.seconds(costs, price), end="\n\n")


def _shape(config: RunConfig) -> ModelShape:
    shape = shape_of(config.model)
    if shape is None:
        raise UserError(
            f"model.path: the sizes of {config.model.path} are unknown: give a folder with the config.json of a model of "
            "Llama's kind, or Llama-2-7b, -13b or -70b",
            4,
        )
    return shape


def _grow(args: argparse.Namespace, overrides: list[str], config: RunConfig, shape: ModelShape) -> int:
    """The table of all numbers of nodes. UserError (2) where the run has no PPO or its settings suit none of them."""
    if "ppo" not in config.pipeline:
        raise UserError("--nodes with several numbers shows iterations of PPO, and the pipeline has no ppo")
    machine = machine_for(config.hardware, args.gpu)
    if not machine.flops:
        raise UserError(f"--nodes: the rates of {machine.name} are unknown; name a machine with --gpu")
    sizes, refused = [], []
    for nodes in sorted(set(args.nodes)):
        try:
            sizes.append(growth.size_of(_on_nodes(args, overrides, config, nodes), shape, machine, nodes))
        except UserError as error:
            refused.append((nodes, error.message))
    if not sizes:
        raise UserError("\n".join(f"{nodes} nodes: {why}" for nodes, why in refused))
    print(f"{config.name}: {shape.parameters / 1e9:.3g}B parameters, an iteration of PPO on {machine.name}\n")
    print(growth.table(sizes, refused))
    return 0 if any(not size.why for size in sizes) else CANNOT


def _on_nodes(args: argparse.Namespace, overrides: list[str], config: RunConfig, nodes: int) -> RunConfig:
    return load(args.runfile, [*overrides, *_workers(config, nodes, args.gpu)])


def _workers(config: RunConfig, nodes: int, gpu: str | None) -> list[str]:
    """Settings for all GPUs of so many nodes; reward models keep their fraction of the workers."""
    hardware = config.hardware
    machine = machine_named(gpu) if gpu else machine_for(hardware, None)
    if not machine.gpus or not hardware.gpus_per_worker:
        raise UserError("--nodes: the run uses no GPU (hardware.gpus_per_worker); set hardware.workers instead")
    workers = max(1, round(nodes * machine.gpus / hardware.gpus_per_worker))
    settings = ["--hardware.workers", str(workers)]
    if hardware.workers_per_reward_model is not None:
        own = max(1, workers * hardware.workers_per_reward_model // hardware.workers)
        settings += ["--hardware.workers_per_reward_model", str(own)]
    return settings
