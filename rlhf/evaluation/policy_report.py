"""What a policy's answers look like: reward alone hides collapse, so length, endings and variety stand beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from reward_data import Prompt, normalised_prompt
from rlhf.evaluation.statistics import Estimate, bootstrap_mean, paired_difference, proportion


@dataclass(frozen=True)
class Answers:
    """The answers to the held-out prompts, in their order, on every rank."""

    texts: list[str]
    lengths: list[int]  # tokens, EOS inside
    finished: list[bool]
    scores: dict[str, list[float]]  # reward.<name>, and gold where there is one
    kl: list[float]  # nats per answer against the reference, k1
    flagged: list[bool]  # the safety model calls the answer unsafe


def policy_report(answers: Answers, prompts: Sequence[Prompt]) -> dict[str, Estimate]:
    """Estimates over n ≥ 1 answers, one to each of `prompts`, clustered by prompt where prompts repeat:

    each name in `scores`   mean score
    kl                      mean nats per answer against the reference
    length                  mean number of tokens
    eos_rate               share of answers that ended themselves
    flagged.<tag>     share of answers to prompts of this tag that the safety model calls unsafe
    distinct_2              mean over answers of distinct bigrams / all bigrams of words: low where answers repeat
                            themselves. Answers of fewer than two words are left out; without others, so is the figure
    """
    clusters = [normalised_prompt(prompt.messages) for prompt in prompts]
    report = {name: bootstrap_mean(values, clusters) for name, values in answers.scores.items()}
    report["kl"] = bootstrap_mean(answers.kl, clusters)
    report["length"] = bootstrap_mean(answers.lengths, clusters)
    report["eos_rate"] = proportion([float(done) for done in answers.finished], clusters)
    for tag in sorted({prompt.tag for prompt in prompts}):
        rows = [i for i, prompt in enumerate(prompts) if prompt.tag == tag]
        report[f"flagged.{tag}"] = proportion([float(answers.flagged[i]) for i in rows], [clusters[i] for i in rows])
    variety = [
        (found, own) for text, own in zip(answers.texts, clusters, strict=True) if (found := distinct_bigrams(text))
    ]
    if variety:
        report["distinct_2"] = bootstrap_mean([found for found, _ in variety], [own for _, own in variety])
    return report


def gain(after: Answers, before: Answers, prompts: Sequence[Prompt]) -> dict[str, Estimate]:
    """By how much each score rose, prompt by prompt: what prompts have in common cancels."""
    clusters = [normalised_prompt(prompt.messages) for prompt in prompts]
    return {name: paired_difference(scores, before.scores[name], clusters) for name, scores in after.scores.items()}


def distinct_bigrams(answer: str) -> float | None:
    """Distinct bigrams / all bigrams of the answer's words (Li et al. 2016, arXiv 1510.03055); None without bigrams."""
    words = answer.split()
    bigrams = list(pairwise(words))
    return len(set(bigrams)) / len(bigrams) if bigrams else None
