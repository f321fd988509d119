"""Alarms: signs in the metrics of an iteration that PPO goes wrong. Pure functions; the trainer reports the alarms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.config import AlarmConfig
from rlhf.errors import UserError


@dataclass(frozen=True)
class Alarm:
    name: str
    text: str  # one line: the metric, its limit and setting, what to look at


def sounding(metrics: Mapping[str, float], first_entropy: float, limits: AlarmConfig) -> Iterator[Alarm]:
    """The alarms of one iteration; `first_entropy` is that of the first. A metric at its limit raises none."""
    kl, eos = metrics["ppo/kl"], metrics["ppo/eos_rate"]
    entropy, failed = metrics["ppo/entropy"], metrics["ppo/reward_failed_fraction"]
    # With an older policy every token differs, a few of them by much, so only the mean shows a wrong sampler.
    which = "mean" if metrics["ppo/staleness"] else "max"
    gap = metrics[f"ppo/rollout_logprob_diff_{which}"]
    if kl > limits.kl_max:
        yield Alarm(
            "kl",
            f"KL to the SFT model is {kl:.3g} nats per response, over {limits.kl_max:g} (ppo.alarms.kl_max): rewards that "
            "far out are mostly mistakes of the reward model; raise ppo.kl_coef or lower ppo.optim.lr",
        )
    if eos < limits.eos_rate_min:
        yield Alarm(
            "eos_rate",
            f"{eos:.1%} of the responses end with EOS, under {limits.eos_rate_min:.1%} (ppo.alarms.eos_rate_min): "
            "read samples; raise ppo.sampling.max_new_tokens or ppo.missing_eos_penalty",
        )
    if entropy < limits.entropy_ratio_min * first_entropy:
        yield Alarm(
            "entropy",
            f"entropy is {entropy:.3g} nats per token, under {limits.entropy_ratio_min:g} (ppo.alarms.entropy_ratio_min) "
            f"of the {first_entropy:.3g} at the start: the policy repeats itself; raise ppo.kl_coef or lower ppo.optim.lr",
        )
    if gap > limits.rollout_logprob_diff_max:
        yield Alarm(
            "rollout_logprob_diff",
            f"sampler and trainer differ by {gap:.3g} nats {'a token' if which == 'mean' else 'at a token'}, over "
            f"{limits.rollout_logprob_diff_max:g} (ppo.alarms.rollout_logprob_diff_max): answers come from another policy than the one "
            f"that learns; look at hardware.precision and at ppo/rollout_logprob_diff_{which} of earlier iterations",
        )

    if failed > limits.reward_failed_fraction_max:
        yield Alarm(
            "reward_failed_fraction",
            f"{failed:.1%} of the scores failed, over {limits.reward_failed_fraction_max:.1%} "
            "(ppo.alarms.reward_failed_fraction_max): these responses are left out of the update; the stage's log says why",
        )


def refuse_not_finite(metrics: Mapping[str, float], iteration: int) -> None:
    """UserError (6) if a metric is NaN or infinite, because then the weights are too."""
    wrong = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise UserError(
            f"iteration {iteration}: {', '.join(wrong)}. Earlier checkpoints are still there. Look at the iterations "
            "before: a gradient norm or a loss that rises says ppo.optim.lr or ppo.critic_optim.lr is too high; "
            "without one, look for scores that are not finite.",
            6,
        )


def noted(known: list[dict[str, Any]], found: Iterable[Alarm], iteration: int) -> list[dict[str, Any]]:
    """`known` with the alarms of this iteration: one entry per name, with its first text and the number of
    iterations."""
    entries = {entry["name"]: entry for entry in known}
    for alarm in found:
        new = asdict(alarm) | {"first": iteration, "iterations": 0}
        entry = entries.get(alarm.name, new)
        entries[alarm.name] = entry | {"iterations": entry["iterations"] + 1}
    return list(entries.values())


def line(entry: Mapping[str, Any]) -> str:
    """An entry of `noted` as a line for people."""
    return f"iteration {entry['first']}: {entry['text']}"
