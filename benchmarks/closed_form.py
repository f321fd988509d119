"""PPO's way to the optimum that a formula gives: `python -m benchmarks.closed_form` trains, prints and draws.

On `benchmarks.small_world` the policy that maximises E[r] - β KL(π‖π_ref) is known: π_ref · exp(r / β) / Z. Nothing of
it enters the training. Reward and KL of the trained policy are sums over all answers, so the errors have no noise of
measurement; what noise they have is that of the samples PPO learned from.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.small_world import MISSING_EOS_PENALTY, Figures, World, train
from launch.plots import MODELS, REFERENCE, drawn
from rlhf.config import OptimConfig, PPOConfig, SamplingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETAS = (2.0, 1.0, 0.5)
LENGTH = 3
ITERATIONS = 400
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "closed-form.png"


def settings(beta: float, length: int, iterations: int, batch_size: int = 1024, lr: float = 2e-3) -> PPOConfig:
    """PPO as it always is, but for three settings without which its limit would be another one.

    Whitening divides rewards by their spread, which is the same as another β: off. Weight decay pulls away from any
    optimum: 0. A constant learning rate keeps jumping around it: annealed to 0.
    """
    optim = OptimConfig(lr=lr, weight_decay=0.0, schedule="cosine", min_lr_share=0.0, warmup_share=0.05)
    return PPOConfig(
        safety_model="helpfulness",
        iterations=iterations,
        batch_size=batch_size,
        minibatch_size=batch_size // 2,
        micro_batch_size=batch_size // 2,
        sampling=SamplingConfig(max_new_tokens=length, batch_size=batch_size),
        beta=beta,
        whiten_rewards=False,
        missing_eos_penalty=MISSING_EOS_PENALTY,
        optim=optim,
        critic_optim=optim,
        eval_every=iterations,
    )


def main() -> None:
    torch.set_num_threads(1)
    world, paths = World(LENGTH), {}
    print(f"{len(world.prompts)} prompts, {len(world.answers)} answers each")
    print("  beta   reward: best  reached   error   KL: best  reached   error   seconds")
    for beta in BETAS:
        start = time.perf_counter()
        paths[beta] = train(world, settings(beta, LENGTH, ITERATIONS)).path
        best, reached = world.figures(world.best(beta)), paths[beta][-1]
        errors = world.errors(reached, beta)
        print(
            f"{beta:6.2f} {best.reward:14.4f} {reached.reward:8.4f} {errors.reward:+7.2%}"
            f" {best.kl:10.4f} {reached.kl:8.4f} {errors.kl:+7.2%} {time.perf_counter() - start:9.0f}",
            flush=True,
        )
    PICTURE.write_bytes(picture(world, paths))
    print(f"drawn: {PICTURE.name}")


@drawn
def picture(world: World, paths: Mapping[float, list[Figures]]) -> Figure:
    """Expected reward against KL, by iteration; the curve is what no policy can be above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    betas = torch.logspace(2, -1, 200).tolist()
    frontier = [world.figures(world.best(beta)) for beta in betas]
    axes.plot([at.kl for at in frontier], [at.reward for at in frontier], color=REFERENCE, label="closed form, any β")
    for (beta, path), colour in zip(paths.items(), MODELS, strict=False):
        best = world.figures(world.best(beta))
        axes.plot(
            [at.kl for at in path], [at.reward for at in path], color=colour, linewidth=0.9, label=f"PPO, β = {beta:g}"
        )
        axes.plot(best.kl, best.reward, "*", color=colour, markersize=13, markeredgecolor="white", zorder=3)
        axes.plot(path[-1].kl, path[-1].reward, ".", color="#202020", zorder=4)
    return figure


if __name__ == "__main__":
    main()
