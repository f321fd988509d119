"""Losses against numbers worked by hand and loops in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.losses import importance_weight, kl_loss, policy_loss, safety_loss, value_loss

MASK = torch.tensor([[True, True, False], [True, False, False]])
ONES = torch.ones(2, 3)
NEW = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -3.0, -3.0]])
OLD = torch.tensor([[-1.1, -1.5, -3.0], [-0.9, -3.0, -3.0]])
ADVANTAGES = torch.tensor([[1.0, -2.0, 5.0], [3.0, 5.0, 5.0]])

logprobs = st.floats(-5, 0, width=32)
tokens = st.lists(
    st.tuples(logprobs, logprobs, st.floats(-3, 3, width=32), st.floats(0, 2, width=32), st.booleans()),
    min_size=1,
    max_size=12,
)


def policy_loss_of_one(new, old, advantage):
    return policy_loss(
        new.view(1, 1), torch.tensor([[old]]), torch.tensor([[advantage]]), torch.ones(1, 1), 0.2, torch.ones(1, 1)
    )


# --- policy ---------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    loss = policy_loss(NEW, OLD, ADVANTAGES, MASK, 0.2, ONES)
    # ratios e^.1 = 1.105 (inside), e^-.5 = .607 (A < 0: clipped at .8), e^.4 = 1.492 (A > 0: clipped at 1.2)
    assert loss.sum.item() == pytest.approx(-math.exp(0.1) + 2 * 0.8 - 3 * 1.2)
    assert loss.count == 3
    assert loss.clipped_sum == 2
    assert loss.approx_kl_sum.item() == pytest.approx((0.01 + 0.25 + 0.16) / 2)


@given(tokens)
def test_policy_loss_agrees_with_a_loop(tokens):
    new, old, advantages, importance, mask = (torch.tensor([list(column)]) for column in zip(*tokens, strict=True))
    loss = policy_loss(new, old, advantages, mask, 0.2, importance)
    total = 0.0
    surplus = []  # of the clipped term over the unclipped one
    for n, o, a, w, is_real in tokens:
        if is_real:
            ratio = math.exp(n - o)
            near = min(max(ratio, 0.8), 1.2)
            total += w * max(-a * ratio, -a * near)
            surplus.append(-a * near + a * ratio)
    assert loss.sum.item() == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert sum(s > 1e-5 for s in surplus) <= loss.clipped_sum <= sum(s > -1e-5 for s in surplus)
    assert loss.count == len(surplus)


def test_on_the_first_minibatch_the_ratio_is_exactly_1():
    new = NEW.clone().requires_grad_()
    loss = policy_loss(new, NEW.clone(), ADVANTAGES, MASK, 0.2, ONES)
    loss.sum.backward()
    assert loss.approx_kl_sum == 0.0 and loss.clipped_sum == 0.0
    torch.testing.assert_close(new.grad, torch.where(MASK, -ADVANTAGES, 0.0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.1, 1.0, True)],
    ids=["too likely and good", "too likely and bad", "too unlikely and good", "too unlikely and bad", "inside"],
)
def test_clipping_stops_the_gradient_only_away_from_the_old_policy(log_ratio, advantage, moves):
    new = torch.tensor(-1.0 + log_ratio, requires_grad=True)
    policy_loss_of_one(new, -1.0, advantage).sum.backward()
    assert new.grad is not None and bool(new.grad != 0) is moves


@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_leave_loss_and_gradient_finite(log_ratio, advantage):
    new = torch.tensor(log_ratio, requires_grad=True)
    loss = policy_loss_of_one(new, 0.0, advantage)
    loss.sum.backward()
    assert loss.sum.isfinite()
    assert new.grad is not None and new.grad.isfinite()


def test_importance_weights_scale_each_token():
    weights = torch.tensor([[2.0, 0.5, 9.0], [0.0, 9.0, 9.0]])
    loss = policy_loss(NEW, OLD, ADVANTAGES, MASK, 0.2, weights)
    assert loss.sum.item() == pytest.approx(-2 * math.exp(0.1) + 0.5 * 2 * 0.8)


def test_only_the_new_logprobs_get_a_gradient():
    inputs = [x.clone().requires_grad_() for x in (NEW, OLD, ADVANTAGES, ONES)]
    new, old, advantages, importance = inputs
    loss = policy_loss(new, old, advantages, MASK, 0.2, importance)
    loss.sum.backward()
    assert [x.grad is not None for x in inputs] == [True, False, False, False]
    assert [name for name, figure in vars(loss).items() if figure.requires_grad] == ["sum"]


def test_the_eos_token_gets_a_gradient_even_where_its_id_is_also_the_padding():
    """Masks come from lengths: an answer of 2 tokens, the second of which is EOS."""
    new = NEW.clone().requires_grad_()
    policy_loss(new, NEW, ADVANTAGES, MASK, 0.2, ONES).sum.backward()
    assert new.grad is not None and new.grad[0, 1] != 0 and new.grad[0, 2] == 0


# --- value ----------------------------------------------------------------------------------------------------------


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 2.0, 9.0], [0.0, 9.0, 9.0]])
    old = torch.tensor([[1.1, 1.0, 9.0], [1.0, 9.0, 9.0]])
    returns = torch.tensor([[2.0, 2.5, 0.0], [0.5, 0.0, 0.0]])
    loss = value_loss(values, old, returns, MASK, clip_range=0.2)
    # errors 1, .5, .5 unclipped; clipped values 1, 1.2, .8 with errors 1, 1.3, .3
    assert loss.sum.item() == pytest.approx(0.5 * (1.0 + 1.3**2 + 0.5**2))
    assert loss.count == 3
    assert loss.clipped_sum == 1


def test_within_the_clip_the_value_gradient_is_the_error():
    values = torch.tensor([[1.0, 2.0, 9.0], [0.0, 9.0, 9.0]], requires_grad=True)
    value_loss(values, values.detach() + 0.1, torch.ones(2, 3), MASK, clip_range=0.2).sum.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]))


def test_only_the_new_values_get_a_gradient():
    inputs = [x.clone().requires_grad_() for x in (NEW, OLD, ADVANTAGES)]
    values, old, returns = inputs
    loss = value_loss(values, old, returns, MASK, clip_range=0.2)
    loss.sum.backward()
    assert [x.grad is not None for x in inputs] == [True, False, False]
    assert [name for name, figure in vars(loss).items() if figure.requires_grad] == ["sum"]


# --- both -----------------------------------------------------------------------------------------------------------

LOSSES = {
    "policy": lambda x, a, b, c, mask: policy_loss(x, a, b, mask, 0.2, c),
    "value": lambda x, a, b, c, mask: value_loss(x, a, b, mask, 0.2),
}
both_losses = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


@both_losses
def test_masked_slots_reach_neither_loss_nor_gradient(loss_of, poison):
    def run(filler):
        new, *others = (torch.where(MASK, x, filler) for x in (NEW, OLD, ADVANTAGES, ONES))
        new.requires_grad_()
        loss = loss_of(new, *others, MASK)
        loss.sum.backward()
        return *vars(loss).values(), new.grad

    for clean, poisoned in zip(run(0.0), run(poison), strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@both_losses
def test_an_empty_mask_gives_a_zero_that_is_attached_to_the_graph(loss_of):
    new = NEW.clone().requires_grad_()
    loss = loss_of(new, OLD, ADVANTAGES, ONES, torch.zeros_like(MASK))
    loss.sum.backward()
    assert loss.sum == 0 and loss.count == 0
    assert new.grad is not None and new.grad.eq(0).all()


@both_losses
@pytest.mark.parametrize("split", [1, 2, 3, 4, 5])
def test_every_split_into_micro_batches_adds_up_to_the_same_mean(loss_of, split):
    generator = torch.Generator().manual_seed(1)
    x, a, b, c = torch.randn(4, 6, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 1, 0, 3, 2, 4])[:, None]  # skewed lengths

    def gradient(rows):
        new = x.clone().requires_grad_()
        losses = [loss_of(new[part], a[part], b[part], c[part].abs(), mask[part]) for part in rows]
        total, count = (torch.stack([getattr(loss, name) for loss in losses]).sum() for name in ("sum", "count"))
        (total / count).backward()
        return new.grad

    torch.testing.assert_close(gradient([slice(0, split), slice(split, 6)]), gradient([slice(0, 6)]))


# --- importance -----------------------------------------------------------------------------------------------------


def test_importance_weight_by_hand(poison):
    train = torch.tensor([-1.0, -1.0, -2.0, poison])
    sampler = torch.tensor([-1.0, -3.0, -1.0, poison])
    weight = importance_weight(train, sampler, 2.0, torch.tensor([True, True, True, False]))
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, math.exp(-1.0), 0.0]))


@given(st.lists(st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 0)), min_size=1, max_size=5), st.floats(1, 10))
def test_importance_weight_is_bounded_however_far_the_engines_drift(pairs, cap):
    train, sampler = torch.tensor(pairs).T
    weight = importance_weight(train, sampler, cap, torch.ones_like(train))
    assert weight.isfinite().all() and (weight >= 0).all() and (weight <= torch.tensor(cap)).all()


def test_importance_weight_carries_no_gradient():
    train = NEW.clone().requires_grad_()
    assert not importance_weight(train, OLD, 2.0, MASK).requires_grad


# --- reward models --------------------------------------------------------------------------------------------------


def test_safety_loss_counts_known_labels_alone(poison):
    scores = torch.tensor([2.0, -1.0, poison], requires_grad=True)
    total, count = safety_loss(scores, torch.tensor([True, True, False]), torch.tensor([True, True, False]))
    total.backward()
    assert total.item() == pytest.approx(math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(1.0)))
    assert count == 2
    assert scores.grad is not None and scores.grad[2] == 0 and scores.grad.isfinite().all()


def test_safety_loss_of_an_unsafe_answer_pulls_its_score_down():
    scores = torch.zeros(1, requires_grad=True)
    safety_loss(scores, torch.tensor([False]), torch.tensor([True]))[0].backward()
    assert scores.grad is not None and scores.grad.item() == pytest.approx(0.5)


@pytest.mark.parametrize("score", [100.0, -100.0])
def test_safety_loss_stays_finite(score):
    total, _ = safety_loss(torch.tensor([score]), torch.tensor([score < 0]), torch.tensor([True]))
    assert total.item() == pytest.approx(100.0)


def test_safety_loss_without_labels_is_attached_to_the_graph():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    total, count = safety_loss(scores, torch.zeros(2), torch.zeros(2))
    total.backward()
    assert total == 0 and count == 0 and scores.grad is not None


# --- KL as a loss -----------------------------------------------------------------------------------------------------


def test_kl_loss_by_hand():
    weights = torch.tensor([[1.0, 0.5, 9.0], [2.0, 9.0, 9.0]])
    k3 = [math.exp(x) - 1 - x for x in (-0.1, 0.5, -0.4)]  # log π_ref - log π
    assert kl_loss(NEW, OLD, MASK, weights).item() == pytest.approx(k3[0] + 0.5 * k3[1] + 2 * k3[2], abs=1e-6)


@given(tokens)
def test_kl_loss_and_its_gradient_agree_with_a_loop(tokens):
    new, ref, _, weight, mask = (torch.tensor([list(column)]) for column in zip(*tokens, strict=True))
    loss = kl_loss(new.requires_grad_(), ref.requires_grad_(), mask, weight.requires_grad_())
    loss.backward()
    real = [(n, r, w) if is_real else (0.0, 0.0, 0.0) for n, r, _, w, is_real in tokens]
    assert loss.item() == pytest.approx(
        sum(w * (math.exp(r - n) - 1 - (r - n)) for n, r, w in real), rel=1e-4, abs=1e-4
    )
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([w * (1 - math.exp(r - n)) for n, r, w in real], rel=1e-4, abs=1e-4)
    assert ref.grad is None


def test_kl_loss_of_the_reference_is_zero_and_has_no_slope():
    new = NEW.clone().requires_grad_()
    loss = kl_loss(new, NEW, MASK, ONES)
    loss.backward()
    assert loss == 0 and new.grad is not None and not new.grad.any()


def test_masked_slots_do_not_reach_the_kl_loss(poison):
    new, ref, weight = (torch.where(MASK, x, poison) for x in (NEW, OLD, ONES))
    new.requires_grad_()
    loss = kl_loss(new, ref, MASK, weight)
    loss.backward()
    assert torch.equal(loss.detach(), kl_loss(NEW, OLD, MASK, ONES))
    assert new.grad is not None and not new.grad[~MASK].any() and new.grad.isfinite().all()


@pytest.mark.parametrize("far", [30.0, 200.0])
def test_a_reference_that_is_far_away_pulls_and_breaks_nothing(far):
    new = torch.tensor([[-far]], requires_grad=True)
    loss = kl_loss(new, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    loss.backward()
    assert loss.isfinite() and new.grad is not None and new.grad.isfinite().all()
    assert loss > 1e8
