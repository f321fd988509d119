"""The engine of one process, against numbers worked by hand."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from rlhf.config import HardwareConfig, LoraConfig, OptimConfig
from rlhf.data.batches import select
from rlhf.distributed import engine as module
from rlhf.distributed.engine import LocalEngine, full_parameters, learning_rate_fraction
from rlhf.models import add_lora
from rlhf.models.policy import PolicyModel
from tests.whole import full_state

HARDWARE = HardwareConfig()


def local(net, optim=None, steps=10, **hardware):
    return LocalEngine(net, optim, steps, HARDWARE.model_copy(update=hardware))


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


def learn(engine, rows_BF, parts):
    """One step on the sum of squares, cut into `parts` backward passes."""
    chunks = rows_BF.chunk(parts)
    for number, chunk in enumerate(chunks, 1):
        engine.backward(engine(chunk).pow(2).sum(), len(rows_BF), last=number == len(chunks))
    return engine.step()


def assert_same(state, other, **tolerance):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def weights(net):
    return {name: tensor.detach().clone() for name, tensor in net.named_parameters()}


# --- learning rate --------------------------------------------------------------------------------------------------


def test_the_cosine_by_hand():
    optim = OptimConfig(lr=1.0, schedule="cosine", warmup_ratio=0.25, min_lr_ratio=0.1)
    share = [learning_rate_fraction(step, optim, 12) for step in range(13)]
    assert share[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])  # three steps of warm-up
    assert share[6] == pytest.approx(0.1 + 0.9 * 0.75)  # a third of the way: ½ (1 + cos 60°)
    assert share[9] == pytest.approx(0.1 + 0.9 * 0.25)
    assert share[12] == pytest.approx(0.1)
    assert learning_rate_fraction(99, optim, 12) == pytest.approx(0.1)


def test_a_constant_rate_stays_after_its_warm_up():
    optim = OptimConfig(lr=1.0, min_warmup_steps=2)
    assert [learning_rate_fraction(step, optim, 50) for step in (0, 1, 2, 49)] == [0.5, 1.0, 1.0, 1.0]


def test_the_longer_warm_up_counts_and_leaves_one_step():
    both = OptimConfig(lr=1.0, warmup_ratio=0.5, min_warmup_steps=2)
    assert learning_rate_fraction(0, both, 20) == 1 / 10
    short = OptimConfig(lr=1.0, min_warmup_steps=50)
    assert [learning_rate_fraction(step, short, 3) for step in range(3)] == [0.5, 1.0, 1.0]
    assert learning_rate_fraction(0, short, 1) == 1.0


def test_an_engine_follows_its_schedule():
    engine = local(network(), OptimConfig(lr=0.2, min_warmup_steps=2), steps=9)
    rates = []
    for _ in range(3):
        rates.append(engine.lr)
        learn(engine, torch.ones(2, 4), 1)
    assert rates == pytest.approx([0.1, 0.2, 0.2])


# --- one step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_no_split_into_micro_batches_changes_the_weights(parts):
    rows_BF = torch.randn(6, 4)
    whole, split = local(network(), OptimConfig(lr=0.05)), local(network(), OptimConfig(lr=0.05))
    for _ in range(3):
        learn(whole, rows_BF, 1)
        learn(split, rows_BF, parts)
    assert_same(weights(split.module), weights(whole.module), atol=1e-5, rtol=0)


def test_decay_pulls_on_matrices_alone():
    net = network()
    before = weights(net)
    engine = local(net, OptimConfig(lr=0.5, weight_decay=0.1))
    engine.backward((engine(torch.ones(1, 4)) * 0).sum(), 1, last=True)
    engine.step()
    for name, tensor in weights(net).items():
        torch.testing.assert_close(tensor, before[name] * (0.95 if tensor.dim() == 2 else 1.0))


def test_adam_by_hand():
    """Kingma & Ba 2015 (arXiv 1412.6980), alg. 1, two steps with the gradients 3 and 4."""
    net = nn.Linear(1, 1, bias=False)
    start = float(net.weight.detach())
    engine = local(net, OptimConfig(lr=0.1, beta1=0.5, beta2=0.75, eps=0.5, weight_decay=0.0, max_grad_norm=99.0))
    for x in (3.0, 4.0):
        engine.backward(engine(torch.tensor([[x]])).sum(), 1, last=True)
        engine.step()
    first = 3.0 / (3.0 + 0.5)  # both moments are those of the one gradient
    mean = (0.5 * 0.5 * 3 + 0.5 * 4) / (1 - 0.5**2)
    square = (0.75 * 0.25 * 9 + 0.25 * 16) / (1 - 0.75**2)
    expected = start - 0.1 * (first + mean / (square**0.5 + 0.5))
    assert float(net.weight.detach()) == pytest.approx(expected, abs=1e-6)


def test_the_norm_is_told_before_clipping_and_the_gradient_is_clipped():
    net = nn.Linear(2, 1, bias=False)
    engine = local(net, OptimConfig(lr=0.1, beta1=0.9, max_grad_norm=1.0))
    engine.backward(engine(torch.tensor([[6.0, 8.0]])).sum(), 2, last=True)  # gradient (3, 4)
    assert engine.step() == pytest.approx(5.0)
    assert engine.optimizer is not None
    first_moment = engine.optimizer.state[net.weight]["exp_avg"]
    assert first_moment.tolist() == [pytest.approx([0.1 * 0.6, 0.1 * 0.8])]


def test_a_step_over_no_tokens_is_finite():
    engine = local(network(), OptimConfig(lr=0.1))
    engine.backward(engine(torch.ones(1, 4)).sum() * 0, 0, last=True)
    assert engine.step() == 0.0


def test_gradients_do_not_outlive_their_step():
    engine = local(network(), OptimConfig(lr=0.0))
    norms = [learn(engine, torch.ones(2, 4), 1) for _ in range(2)]
    assert norms[0] == norms[1] > 0


def test_a_loaded_engine_makes_the_same_next_steps(tmp_path):
    rows_BF, optim = torch.randn(6, 4), OptimConfig(lr=0.05, schedule="cosine", min_warmup_steps=3)
    engine, resumed = local(network(), optim), local(network(), optim)
    for _ in range(2):
        learn(engine, rows_BF, 1)
    engine.save(tmp_path)
    resumed.load(tmp_path)
    for _ in range(2):
        assert resumed.lr == engine.lr
        learn(engine, rows_BF, 1)
        learn(resumed, rows_BF, 1)
        assert_same(weights(resumed.module), weights(engine.module), atol=0, rtol=0)


def test_a_frozen_engine_has_nothing_to_train():
    engine = local(network())
    assert not engine(torch.ones(1, 4)).requires_grad
    assert not any(p.requires_grad for p in engine.module.parameters())


def test_bf16_runs_in_autocast_on_float32_weights(make_llama, iteration):
    rollout = iteration.rollout
    arguments = rollout.tokens_BT, rollout.mask_BT, 9, 0.7
    exact, rounded = (
        local(PolicyModel(make_llama(0))),
        local(PolicyModel(make_llama(0)), OptimConfig(lr=1e-3), precision="bf16"),
    )
    gap = (rounded(*arguments)[0] - exact(*arguments)[0])[rollout.response_mask_BR].abs().max()
    assert 1e-4 < gap < 0.2
    assert rounded(*arguments)[0].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in rounded.module.parameters())


def test_frozen_weights_in_bf16_give_what_autocast_gives(make_llama, make_scalar, iteration):
    tokens_BT, mask_BT = iteration.rollout.tokens_BT, iteration.rollout.mask_BT
    for make, arguments in ((lambda: PolicyModel(make_llama(0)), (9, 0.7)), (lambda: make_scalar(2), ())):
        learner, frozen = local(make(), OptimConfig(lr=1e-3), precision="bf16"), local(make(), precision="bf16")
        kept = sum(p.numel() * p.element_size() for p in frozen.module.parameters())
        assert kept < sum(p.numel() * p.element_size() for p in learner.module.parameters())
        for ours, autocasts in zip(
            frozen(tokens_BT, mask_BT, *arguments), learner(tokens_BT, mask_BT, *arguments), strict=True
        ):
            torch.testing.assert_close(ours, autocasts.detach(), rtol=0, atol=0)


def test_what_lies_under_an_adapter_is_kept_in_bf16(make_llama, iteration):
    """As autocast would cast it: the same logprobs, at half the memory. What learns stays float32."""
    arguments = iteration.rollout.tokens_BT, iteration.rollout.mask_BT, 9, 0.7

    def adapted(precision):
        policy = add_lora(make_llama(0), LoraConfig(rank=2, alpha=4), "causal", 0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.05)
        return local(PolicyModel(policy), OptimConfig(lr=1e-3), precision=precision)

    float32, bf16 = adapted("float32"), adapted("bf16")
    float32.precision = "bf16"  # autocast over weights that are float32
    torch.testing.assert_close(bf16(*arguments)[0], float32(*arguments)[0], rtol=0, atol=0)
    kinds = {(p.requires_grad, p.dtype) for n, p in bf16.module.named_parameters() if "_proj" in n}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_with_adapters_every_role_of_ppo_takes_what_its_shapes_say(make_llama, make_scalar):
    """The arithmetic of docs/how-to/my-model.md, on a Llama that can be counted: products bf16, the rest float32."""
    V, H, I, L, r = 12, 16, 24, 2, 2
    products, table, norms = L * (4 * H * H + 3 * H * I), V * H, (2 * L + 1) * H
    adapters = L * r * (8 * H + 3 * (H + I))
    lora, optim = LoraConfig(rank=r, alpha=4), OptimConfig(lr=1e-3)

    def size(module, learns=None):
        engine = local(module, learns, precision="bf16")
        return sum(p.numel() * p.element_size() for p in engine.module.parameters())

    backbone = 2 * products + 4 * (table + norms)
    policy = size(PolicyModel(add_lora(make_llama(0), lora, "causal", 0)), optim)
    critic = size(add_lora(make_scalar(1), lora, "scalar", 0), optim)
    assert policy == backbone + 2 * table + 4 * adapters
    assert size(PolicyModel(make_llama(0))) == backbone + 2 * table
    assert critic == backbone + 4 * H + 4 * adapters
    assert size(make_scalar(2)) == backbone + 4 * H


def test_steps_are_the_same_where_casts_are_kept(make_llama, iteration):
    def learned(around):
        engine = local(PolicyModel(make_llama(0)), OptimConfig(lr=1e-2), precision="bf16")
        for _ in range(2):  # a cast that outlived its step would be of old weights
            with around(engine):
                for part in (slice(0, 3), slice(3, 6)):
                    rollout = select(iteration.rollout, part)
                    loss = engine(rollout.tokens_BT, rollout.mask_BT, 9, 0.7)[0].sum()
                    engine.backward(loss, 10, last=part.start == 3)
            engine.step()
        return weights(engine.module)

    steady, casting = learned(LocalEngine.steady), learned(lambda engine: nullcontext())
    assert_same(steady, casting, rtol=0, atol=1e-6)


# --- whole weights --------------------------------------------------------------------------------------------------


def test_all_parameters_of_a_whole_module(monkeypatch):
    net = network()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("0."))
    for size in (1, 100, 1 << 20):
        monkeypatch.setattr(module, "BUCKET_BYTES", size)
        assert_same(full_state(net), weights(net), atol=0, rtol=0)
        assert [name for name, _ in full_parameters(net, trainable_only=True)] == ["0.weight", "0.bias"]
