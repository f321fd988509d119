"""What a policy's responses look like: reward alone hides collapse, so length, endings and variety stand beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from reward_data import Prompt, normalised_prompt
from rlhf.evaluation.statistics import Estimate, bootstrap_mean, differences, known_only, proportion

Values = Sequence[float | None]
PROPORTIONS = ("eos_rate", "flagged.")  # the names of these metrics begin so; the others are means


@dataclass(frozen=True)
class HeldOutResponses:
    """The responses to the held-out prompts, in their order, on every rank."""

    texts: list[str]
    lengths: Values  # tokens, EOS inside; None where they are not known
    finished: list[bool]
    scores: Mapping[str, Sequence[float | None]]  # reward.<name>, and gold where there is one; None where it failed
    kl: list[float] | None  # nats per response against the reference, k1; None without one
    flagged: list[bool] | None  # the safety model calls the response unsafe; None without such a model


def policy_report(responses: HeldOutResponses, prompts: Sequence[Prompt]) -> dict[str, Estimate]:
    """Estimates over n ≥ 1 responses, one to each of `prompts`, clustered by prompt where prompts repeat:

    each name in `scores`   mean score of the responses whose score did not fail; none where all failed
    kl                      mean nats per response against the reference
    length                  mean number of tokens
    eos_rate               share of responses that ended themselves
    flagged.<tag>     share of responses to prompts of this tag that the safety model calls unsafe
    distinct_2              mean over responses of distinct bigrams / all bigrams of words: low where responses repeat
                            themselves. Responses of fewer than two words are left out; without others, so is the figure
    """
    clusters = [normalised_prompt(prompt.messages) for prompt in prompts]
    return estimates(values_by_prompt(responses, prompts), clusters)


def values_by_prompt(responses: HeldOutResponses, prompts: Sequence[Prompt]) -> dict[str, Values]:
    """What `policy_report` is the mean of: a value of each metric for each prompt, None where it has none."""
    values: dict[str, Values] = {**responses.scores}
    if responses.kl is not None:
        values["kl"] = responses.kl
    values["length"] = responses.lengths
    values["eos_rate"] = [float(done) for done in responses.finished]
    for tag in sorted({prompt.tag for prompt in prompts}) if responses.flagged is not None else ():
        flagged = zip(responses.flagged or (), prompts, strict=True)
        values[f"flagged.{tag}"] = [float(unsafe) if prompt.tag == tag else None for unsafe, prompt in flagged]
    values["distinct_2"] = [distinct_bigrams(text) for text in responses.texts]
    return values


def estimates(values: Mapping[str, Values], clusters: Sequence[str]) -> dict[str, Estimate]:
    """Of each metric over the prompts that have a value; none where no prompt has one."""
    report = {}
    for name, column in values.items():
        known, own = known_only(column, clusters)
        if known:
            interval = proportion if name.startswith(PROPORTIONS) else bootstrap_mean
            report[name] = interval(known, own)
    return report


def gain(after: HeldOutResponses, before: HeldOutResponses, prompts: Sequence[Prompt]) -> dict[str, Estimate]:
    """By how much each score rose, prompt by prompt: what prompts have in common cancels."""
    clusters = [normalised_prompt(prompt.messages) for prompt in prompts]
    gains = {name: differences(scores, before.scores[name]) for name, scores in after.scores.items()}
    return estimates(gains, clusters)


def distinct_bigrams(response: str) -> float | None:
    """Distinct bigrams / all bigrams of the response's words (Li et al. 2016, arXiv 1510.03055); None without bigrams."""
    words = response.split()
    bigrams = list(pairwise(words))
    return len(set(bigrams)) / len(bigrams) if bigrams else None
