"""Products with packed and with plain weights against torch's own operations in float64."""

import pytest
import torch

from rlhf.kernels import linear
from rlhf.kernels.linear import Linear, can_pack

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the largest entry


@pytest.fixture(params=["packed", "plain"])
def form(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(linear, "can_pack", lambda weight: False)
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("N", [1, 5])
def test_products_and_what_follows_them(form, dtype, N):
    x, weight, other = (torch.randn(shape).to(dtype) for shape in ((N, 24), (40, 24), (N, 40)))
    product = Linear(weight)
    if form == "packed" and not can_pack(weight):
        pytest.skip(f"this processor has no packed {dtype} kernels")
    exact = x.double() @ weight.double().T
    before = [t.clone() for t in (x, other)]
    for got, expected in (
        (product(x), exact),
        (product(x, "swish"), exact * torch.sigmoid(exact)),
        (product.combined(x, other, "add"), exact + other.double()),
        (product.combined(x, other, "mul"), exact * other.double()),
    ):
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()
    assert torch.equal(x, before[0]) and torch.equal(other, before[1])
