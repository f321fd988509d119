"""The tokens that a served row may draw, beside transformers' own, and how often it draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import TopPLogitsWarper

from rlhf.chat.stream import TextStream
from rlhf.serving.rows import Row, Sampling, row_key
from rlhf.serving.sampling import Drawing, nucleus


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p: float) -> None:
    logits_SV = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).double() * 3
    probs_SV = torch.softmax(logits_SV, -1)
    kept_SV = torch.isfinite(TopPLogitsWarper(top_p)(None, logits_SV))  # type: ignore[arg-type]
    found_SV = nucleus(probs_SV, torch.full((50,), top_p, dtype=torch.float64))
    assert torch.equal(found_SV > 0, kept_SV)
    assert torch.equal(found_SV[kept_SV], probs_SV[kept_SV])


def test_each_row_has_its_own_nucleus() -> None:
    """The likeliest token is always in it; the one that reaches top_p is, too."""
    probs_SV = torch.tensor([[0.125, 0.5, 0.25, 0.125]] * 4)
    found_SV = nucleus(probs_SV, torch.tensor([0.0, 0.5, 0.75, 0.76]))
    assert (found_SV > 0).tolist() == [
        [False, True, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [True, True, True, False],
    ]


def rows(count: int, **sampling: float) -> list[Row]:
    stream = TextStream(None)  # type: ignore[arg-type]  no text is made
    setting = Sampling(max_tokens=1, **sampling)  # type: ignore[arg-type]
    return [Row([1], setting, row_key(n, 0), frozenset(), stream, lambda _: None) for n in range(count)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"top_p": 0.7}, [0.5 / 0.8, 0.3 / 0.8, 0.0]),
        ({"top_p": 1.0}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.5}, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        ({"temperature": 0.5, "top_p": 0.7}, [0.25 / 0.34, 0.09 / 0.34, 0.0]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(sampling: dict[str, float], expected: list[float]) -> None:
    S = 20_000
    drawing = Drawing.of(rows(S, **sampling), torch.device("cpu"))
    logits_SV = torch.tensor([0.5, 0.3, 0.2]).log().repeat(S, 1)
    counts = np.bincount(drawing.tokens(logits_SV).numpy(), minlength=3)
    possible = np.array(expected) > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], S * np.array(expected)[possible]).pvalue > 1e-4


def test_rows_with_and_without_a_nucleus_are_drawn_together() -> None:
    mixed = [*rows(3000, top_p=0.4), *rows(3000), *rows(1, temperature=0.0)]
    drawing = Drawing.of(mixed, torch.device("cpu"))
    tokens = drawing.tokens(torch.tensor([0.5, 0.3, 0.2]).log().repeat(6001, 1)).numpy()
    assert set(tokens[:3000]) == {0}
    assert chisquare(np.bincount(tokens[3000:6000]), [1500, 900, 600]).pvalue > 1e-4
    assert tokens[6000] == 0
