"""What a policy's responses look like: reward alone hides collapse, so length, endings and variety stand beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from reward_data import Prompt, normalised_prompt
from rlhf.evaluation.statistics import Estimate, bootstrap_mean, proportion


@dataclass(frozen=True)
class HeldOutResponses:
    """The responses to the held-out prompts, in their order, on every rank."""

    texts: list[str]
    lengths: list[int]  # tokens, EOS inside
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
    report = _mean_of_known(responses.scores, clusters)
    if responses.kl is not None:
        report["kl"] = bootstrap_mean(responses.kl, clusters)
    report["length"] = bootstrap_mean(responses.lengths, clusters)
    report["eos_rate"] = proportion([float(done) for done in responses.finished], clusters)
    if responses.flagged is not None:
        for tag in sorted({prompt.tag for prompt in prompts}):
            of_tag = [i for i, prompt in enumerate(prompts) if prompt.tag == tag]
            flagged = [float(responses.flagged[i]) for i in of_tag]
            report[f"flagged.{tag}"] = proportion(flagged, [clusters[i] for i in of_tag])
    variety = [
        (found, own) for text, own in zip(responses.texts, clusters, strict=True) if (found := distinct_bigrams(text))
    ]
    if variety:
        report["distinct_2"] = bootstrap_mean([found for found, _ in variety], [own for _, own in variety])
    return report


def gain(after: HeldOutResponses, before: HeldOutResponses, prompts: Sequence[Prompt]) -> dict[str, Estimate]:
    """By how much each score rose, prompt by prompt: what prompts have in common cancels."""
    clusters = [normalised_prompt(prompt.messages) for prompt in prompts]
    differences = {
        name: [None if a is None or b is None else a - b for a, b in zip(scores, before.scores[name], strict=True)]
        for name, scores in after.scores.items()
    }
    return _mean_of_known(differences, clusters)


def _mean_of_known(scores: Mapping[str, Sequence[float | None]], clusters: Sequence[str]) -> dict[str, Estimate]:
    """The mean of each series over the values that did not fail."""
    report = {}
    for name, values in scores.items():
        known = [(value, own) for value, own in zip(values, clusters, strict=True) if value is not None]
        if known:
            report[name] = bootstrap_mean([value for value, _ in known], [own for _, own in known])
    return report


def distinct_bigrams(response: str) -> float | None:
    """Distinct bigrams / all bigrams of the response's words (Li et al. 2016, arXiv 1510.03055); None without bigrams."""
    words = response.split()
    bigrams = list(pairwise(words))
    return len(set(bigrams)) / len(bigrams) if bigrams else None
