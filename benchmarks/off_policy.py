"""The effect of one-step off-policy responses on learning: `python -m benchmarks.off_policy` trains, prints and draws.

In `benchmarks.small_world` PPO trains with the same seeds in three ways: on responses of the current policy, on those
of the policy of one update earlier (`ppo.sampling.one_step_off_policy`), and on the latter without importance weights.
Reward and KL after each iteration are sums over all responses, so curves differ by learning only. The learning rate is
constant: that of `benchmarks.closed_form`, and four and ten times as much, where an update moves the policy too far and
its age matters most.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch

from benchmarks import turns
from benchmarks.closed_form import LENGTH, settings
from benchmarks.small_world import World, train
from launch.plots import MODELS, drawn
from rlhf.algorithms.masked import keep
from rlhf.config import PPOConfig
from rlhf.ppo import experience

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETA = 0.5
WAYS = ("on-policy", "off-policy", "off-policy, not weighted")
RATES = (5e-3, 2e-2, 5e-2)
SHOWN = (5, 10, 20, 40, 80)  # iterations of the table


@dataclass(frozen=True)
class Run:
    way: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Curve:
    """Fraction of what can be gained, E[r] - β KL of the best policy, after each iteration."""

    gained: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.off_policy", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="at least 2, for an interval (default 8)")
    parser.add_argument("--quick", action="store_true", help="two seeds and ten iterations: does it work?")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("off_policy.json"), help="the picture goes beside it, as .png")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: at least 2")
    iterations = SHOWN[1] if arguments.quick else SHOWN[-1]
    runs = [Run(*each) for each in product(WAYS, RATES, range(2 if arguments.quick else arguments.seeds))]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        curves = dict(zip(runs, pool.map(learn, runs, [iterations] * len(runs)), strict=True))
    print(table(curves))
    told = [{**asdict(run), **asdict(curve)} for run, curve in curves.items()]
    arguments.out.write_text(json.dumps({"beta": BETA, "length": LENGTH, "curves": told}, indent=1) + "\n")
    arguments.out.with_suffix(".png").write_bytes(picture(curves))


def learn(run: Run, iterations: int) -> Curve:
    torch.set_num_threads(1)
    world = World(LENGTH)
    with mock.patch.object(
        experience, "importance_weight", _one if run.way == WAYS[2] else experience.importance_weight
    ):
        path = train(world, _settings(run, iterations), run.seed).path
    best = world.metrics(world.best(BETA))
    return Curve([(at.reward - BETA * at.kl) / (best.reward - BETA * best.kl) for at in path])


def _settings(run: Run, iterations: int) -> PPOConfig:
    given = settings(BETA, iterations)
    optim = given.optim.model_copy(update={"lr": run.rate, "schedule": "constant", "warmup_ratio": 0.0})
    sampling = given.sampling.model_copy(update={"one_step_off_policy": run.way != WAYS[0]})
    return given.model_copy(update={"optim": optim, "critic_optim": optim, "sampling": sampling})


def _one(
    train_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor, cap: float, mask: torch.Tensor
) -> torch.Tensor:
    """Replaces the importance weights by 1."""
    del behaviour_logprobs, cap
    return keep(torch.ones_like(train_logprobs), mask)


def table(curves: Mapping[Run, Curve]) -> str:
    """Means over the seeds, and of the difference from on-policy responses the 95 % interval of its mean."""
    shown = [number for number in SHOWN if number < len(next(iter(curves.values())).gained)]
    lines = []
    for rate, way in product(RATES, WAYS):
        mine = _of(curves, way, rate)
        cells = [f"{statistics.fmean(gained[n] for gained in mine):.3f}" for n in shown]
        gaps = [own[shown[-1]] - other[shown[-1]] for own, other in zip(mine, _of(curves, WAYS[0], rate), strict=True)]
        spread = 1.96 * statistics.stdev(gaps) / len(gaps) ** 0.5
        last = "" if way == WAYS[0] else f"{statistics.fmean(gaps):+.3f} ± {spread:.3f}"
        lines.append([f"{rate:g}", way, *cells, last])
    return turns.table(["learning rate", "answers", *(f"after {n}" for n in shown), "last, less on-policy"], lines)


def _of(curves: Mapping[Run, Curve], way: str, rate: float) -> Sequence[list[float]]:
    """By seed."""
    return [curve.gained for run, curve in curves.items() if (run.way, run.rate) == (way, rate)]


@drawn
def picture(curves: Mapping[Run, Curve]) -> Figure:
    """A thin line per seed, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(RATES), sharey=True), RATES, strict=True):
        for way, colour in zip(WAYS, MODELS, strict=False):
            mine = _of(curves, way, rate)
            for gained in mine:
                axes.plot(gained, color=colour, linewidth=0.5, alpha=0.35)
            axes.plot([statistics.fmean(at) for at in zip(*mine, strict=True)], color=colour, linewidth=1.8, label=way)
        axes.set_title(f"learning rate {rate:g}")
        axes.set_xlabel("iteration")
        axes.set_ylim(-0.5, 1.05)
    figure.axes[0].set_ylabel("share of what can be gained")
    figure.axes[0].legend(loc="lower right", title="answers")
    return figure


if __name__ == "__main__":
    main()
