"""How far the responses to one prompt differ from each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from rlhf.evaluation.statistics import Estimate, mean_of_known

ORDERS = 4  # of BLEU
DISTINCT = (1, 2, 3)

NGram = tuple[str, ...]


def diversity(responses: Sequence[Sequence[str]], clusters: Sequence[Hashable]) -> dict[str, Estimate]:
    """Of the responses to each prompt, in words between white space; `clusters` names the prompt.

    distinct_1, _2, _3  distinct n-grams / all n-grams in the responses to a prompt together (Li et al. 2016), mean over
                        prompts. More responses to a prompt lower it: compare equal numbers
    self_bleu           BLEU of each response with the others to its prompt as references (Zhu et al. 2018), mean over
                        prompts of two responses or more: 1 where all are equal
    """
    words = [[response.split() for response in of_prompt] for of_prompt in responses]
    values: dict[str, list[float | None]] = {f"distinct_{n}": [distinct(one, n) for one in words] for n in DISTINCT}
    values["self_bleu"] = [self_bleu(one) if len(one) > 1 else None for one in words]
    return {name: mean for name, column in values.items() if (mean := mean_of_known(column, clusters))}


def distinct(responses: Sequence[Sequence[str]], n: int) -> float | None:
    """Distinct n-grams / all n-grams; None without n-grams."""
    grams = [gram for words in responses for gram in ngrams(words, n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(responses: Sequence[Sequence[str]]) -> float:
    """Mean BLEU of each response against all others."""
    scores = [bleu(words, [*responses[:n], *responses[n + 1 :]]) for n, words in enumerate(responses)]
    return sum(scores) / len(scores)


def bleu(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of one sentence, 0 to 1 (Papineni et al. 2002), as sacrebleu's sentence_bleu: a precision of 0 counts as half
    of the least possible one, the next as a quarter (`exp`), and orders that the sentence is too short for do not count.
    Two empty texts are equal: 1.
    """
    if not words:
        return float(not any(references))
    logs, halved, matched = [], 1.0, False
    for n in range(1, min(ORDERS, len(words)) + 1):
        own, most = Counter(ngrams(words, n)), Counter[NGram]()
        for reference in references:
            most |= Counter(ngrams(reference, n))
        correct, total = (own & most).total(), own.total()
        matched |= correct > 0
        if not correct:
            halved *= 2
        logs.append(math.log((correct or 1 / halved) / total))
    if not matched:
        return 0.0
    closest = min((len(reference) for reference in references), key=lambda length: (abs(length - len(words)), length))
    return math.exp(min(0.0, 1 - closest / len(words)) + sum(logs) / len(logs))


def ngrams(words: Sequence[str], n: int) -> list[NGram]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
