"""What a layout of PPO did, and how far that is from what another did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCE = {"answers": 0, "metrics": 1e-5, "gradients": 1e-5, "weights": 1e-5, "worst weight": 1e-3}
"""All relative but the answers. Float32 rounds at 6e-8 and sums of some hundred terms come to 1e-6, which leaves a factor
of ten. A single weight may be further off: where its gradient is nearly 0, Adam divides rounding by rounding."""
ROUNDING = (
    "ppo/rollout_logprob_diff",
    "perf/",
)  # figures that are themselves rounding errors, and those that measure time
OF_ONE = ("ppo/explained_variance", "ppo/kl", "ppo/policy_loss")
"""Small differences of numbers of one or more, which round as those do: the policy loss is a mean of advantages that are
whitened, or centred in their group, so its terms are of order one and nearly cancel."""


@dataclass
class Trajectory:
    """What a layout did, iteration by iteration and optimizer step by optimizer step."""

    answers: list[Tensor] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # before clipping
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def differences(found: Trajectory, expected: Trajectory) -> dict[str, float]:
    """Answers: tokens that differ. Figures: to the largest value of the figure in the run, or to one. Gradients and weights:
    Euclidean norm of the difference to that of the gradient, and to that of the weights' change over the run; the worst
    weight: to the largest change of a weight. Always the worst iteration, step and model."""
    answers = sum(int((a != b).sum()) for a, b in zip(found.answers, expected.answers, strict=True))
    metrics = 0.0
    for name in expected.metrics[0]:
        if not name.startswith(ROUNDING):
            a, b = (torch.tensor([step[name] for step in side.metrics]) for side in (found, expected))
            scale = 1.0 if name in OF_ONE else float(b.abs().max())
            metrics = max(metrics, relative(float((a - b).abs().max()), scale))
    gradients, weights, worst = [], [], []
    for model in {name.partition(".")[0] for name in expected.weights}:
        for one, other in zip(found.gradients, expected.gradients, strict=True):
            a, b = of_model(one, model), of_model(other, model)
            gradients.append(float((a - b).norm() / b.norm()))
        a, b, start = (of_model(state, model) for state in (found.weights, expected.weights, expected.start))
        weights.append(float((a - b).norm() / (b - start).norm()))
        worst.append(float((a - b).abs().max() / (b - start).abs().max()))
    return {
        "answers": answers,
        "metrics": metrics,
        "gradients": max(gradients),
        "weights": max(weights),
        "worst weight": max(worst),
    }


def relative(difference: float, scale: float) -> float:
    """Infinite for NaN, and for a difference from what is 0 throughout."""
    if difference == 0:
        return 0.0
    return difference / scale if scale and not math.isnan(difference) else math.inf


def of_model(state: dict[str, Tensor], model: str) -> Tensor:
    return torch.cat([tensor.flatten() for name, tensor in sorted(state.items()) if name.startswith(model)])
