"""PPO against the closed-form optimum: `python -m benchmarks.closed_form` trains, prints and draws.

In `benchmarks.small_world` the policy that maximises E[r] - β KL(π‖π_ref) is known: π_ref · exp(r / β) / Z. Training
does not use it. Reward and KL of the trained policy are sums over all responses, so the errors have no measurement
noise, only that of the samples PPO trained on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.small_world import MISSING_EOS_PENALTY, Figures, World, train
from launch.plots import MODELS, REFERENCE, drawn
from rlhf.config import OptimConfig, PPOConfig, SamplingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETAS = (2.0, 1.0, 0.5)
LENGTH = 2
ITERATIONS = 300
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "closed-form.png"


def settings(kl_coef: float, iterations: int) -> PPOConfig:
    """PPO with its defaults, except for three settings that would change its limit.

    Reward whitening is off, because dividing rewards by their spread is another β. Weight decay is 0, because it pulls
    away from any optimum. The learning rate is annealed to 0, because a constant one keeps jumping around the optimum.
    """
    optim = OptimConfig(lr=5e-3, weight_decay=0.0, schedule="cosine", min_lr_ratio=0.0, warmup_ratio=0.05)
    return PPOConfig(
        safety_model="helpfulness",
        iterations=iterations,
        batch_size=256,
        minibatch_size=128,
        micro_batch_size=128,
        sampling=SamplingConfig(max_new_tokens=LENGTH, batch_size=256),
        kl_coef=kl_coef,
        whiten_rewards=False,
        missing_eos_penalty=MISSING_EOS_PENALTY,
        optim=optim,
        critic_optim=optim,
        eval_every=iterations,
    )


def main() -> None:
    world = World(LENGTH)
    print(f"{len(world.prompts)} prompts, {len(world.answers)} answers each, {ITERATIONS} iterations")
    print("   β   best reward   reached    error     its KL   reached    error   CPU s", flush=True)
    paths = {}
    with ProcessPoolExecutor(len(BETAS), mp_context=get_context("spawn")) as pool:
        for kl_coef, (path, seconds) in zip(BETAS, pool.map(reach, BETAS), strict=True):
            best, reached, errors = world.metrics(world.best(kl_coef)), path[-1], world.errors(path[-1], kl_coef)
            print(
                f"{kl_coef:4.1f}   {best.reward:11.4f} {reached.reward:9.4f} {errors.reward:+8.2%}"
                f"   {best.kl:8.4f} {reached.kl:9.4f} {errors.kl:+8.2%}   {seconds:5.0f}",
                flush=True,
            )
            paths[kl_coef] = path
    PICTURE.write_bytes(picture(world, paths))


def reach(kl_coef: float) -> tuple[list[Figures], float]:
    """The path of PPO under β, and the seconds of CPU that it took."""
    torch.set_num_threads(1)
    start = time.process_time()
    path = train(World(LENGTH), settings(kl_coef, ITERATIONS)).path
    return path, time.process_time() - start


@drawn
def picture(world: World, paths: Mapping[float, list[Figures]]) -> Figure:
    """Expected reward against KL by iteration, and the curve of the best policies, above which there is none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.subplots()
    frontier = [world.metrics(world.best(kl_coef)) for kl_coef in torch.logspace(2, -0.5, 200).tolist()]
    axes.plot(*_across(frontier), color=REFERENCE, linewidth=3, label="closed form, every β")
    for (kl_coef, path), colour in zip(paths.items(), MODELS, strict=False):
        axes.plot(*_across(path), color=colour, linewidth=0.9, label=f"PPO, β = {kl_coef:g}")
        axes.plot(
            *_across([world.metrics(world.best(kl_coef))]), "*", color=colour, markersize=15, markeredgecolor="white"
        )
        axes.plot(*_across(path[-1:]), "o", color="#202020", markersize=3.5, zorder=4)
    axes.plot([], [], "*", color=REFERENCE, markersize=12, markeredgecolor="white", label="closed form, this β")
    axes.plot([], [], "o", color="#202020", markersize=3.5, label="PPO at its end")
    axes.set_title("PPO ends where the closed form says")
    axes.set_xlabel("KL to the reference, nats per response")
    axes.set_ylabel("expected reward")
    axes.legend(loc="lower right")
    return figure


def _across(path: list[Figures]) -> tuple[list[float], list[float]]:
    return [at.kl for at in path], [at.reward for at in path]


if __name__ == "__main__":
    main()
