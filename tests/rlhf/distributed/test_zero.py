"""ZeRO on two ranks, against plain torch in one process.

The file is also the program of each rank: `test_zero.py FOLDER`.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch

from rlhf.config import HardwareConfig, OptimConfig
from rlhf.distributed import engine as module
from rlhf.distributed.engine import full_parameters, open_engine
from rlhf.models.policy import PolicyModel
from tests.whole import full_state
from tests.worker_group import leave, run_ranks

HARDWARE = HardwareConfig()


def assert_same(state, other, **tolerance):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def weights(net):
    return {name: tensor.detach().clone() for name, tensor in net.named_parameters()}


RANKS = 2
OPTIM = OptimConfig(lr=1e-2, schedule="cosine", min_warmup_steps=2)
STEPS = 8


@pytest.fixture(scope="module")
def on_two_ranks(make_llama, make_scalar, iteration, ppo_config, tmp_path_factory):
    """(folder with what two ranks found, the modules and the PPO settings that they were given)."""
    folder = tmp_path_factory.mktemp("ranks")
    config = ppo_config.model_copy(
        update={"minibatch_size": 4, "micro_batch_size": 1, "optim": OPTIM, "critic_optim": OPTIM}
    )
    given = {
        "policy": PolicyModel(make_llama(0)),
        "critic": make_scalar(2),
        "rollout": iteration.rollout,
        "experience": iteration.experience,
        "config": config,
    }
    torch.save(given, folder / "given.pt")
    run_ranks(__file__, folder, RANKS, timeout=170)
    return torch.load(folder / "found.pt", weights_only=False), given


@pytest.fixture(scope="module")
def alone(on_two_ranks):
    """What plain torch in one process makes of the same."""
    _, given = on_two_ranks
    return after_update(given, HARDWARE, is_local=True)


def after_update(given, hardware, is_local):
    """Weights and metrics after one PPO update of two minibatches."""
    from rlhf.ppo.update import update

    policy = open_engine(copy.deepcopy(given["policy"]), OPTIM, STEPS, hardware, is_local)
    critic = open_engine(copy.deepcopy(given["critic"]), OPTIM, STEPS, hardware, is_local)
    metrics = update(policy, critic, given["experience"], given["config"], (0, 1), kl_loss_coef=0.0)
    return {
        "policy": full_state(policy.module),
        "critic": full_state(critic.module),
        "metrics": metrics,
        "engines": (policy, critic),
    }


STAGES = pytest.mark.parametrize("stage", [0, 2, 3])


@pytest.mark.integration
@STAGES
def test_two_ranks_under_zero_make_the_update_of_one_process(on_two_ranks, alone, stage):
    found = on_two_ranks[0][stage]
    for name in ("policy", "critic"):
        assert_same(found[name], alone[name], atol=1e-5, rtol=1e-5)
    assert found["metrics"] == {name: pytest.approx(value, abs=1e-4) for name, value in alone["metrics"].items()}


@pytest.mark.integration
def test_the_update_moved_more_than_the_tolerance(on_two_ranks, alone):
    before = weights(on_two_ranks[1]["policy"])
    assert max((alone["policy"][name] - tensor).abs().max() for name, tensor in before.items()) > 5e-3


@pytest.mark.integration
@STAGES
def test_frozen_models_under_zero_say_what_they_say_alone(on_two_ranks, stage):
    found, given = on_two_ranks
    tokens, mask = given["rollout"].tokens_BT, given["rollout"].mask_BT
    with torch.no_grad():
        torch.testing.assert_close(found[stage]["values"], given["critic"](tokens, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.integration
@STAGES
def test_a_loaded_engine_under_zero_makes_the_same_next_step(on_two_ranks, stage):
    found = on_two_ranks[0][stage]
    assert_same(found["resumed"], found["next"], atol=0, rtol=0)
    assert max((found["next"][name] - tensor).abs().max() for name, tensor in found["policy"].items()) > 1e-4


@pytest.mark.integration
def test_shards_are_gathered_bucket_by_bucket(on_two_ranks):
    """Under ZeRO-3 a parameter of this module has no elements of its own: its whole size must be counted."""
    found, given = on_two_ranks
    sizes = [4 * p.numel() for p in given["policy"].parameters()]
    assert found["gathered_at_once"] <= found["bucket_bytes"] + max(sizes) < sum(sizes)


@pytest.mark.integration
def test_a_sampler_that_took_its_weights_from_shards_holds_the_policy(on_two_ranks):
    found, _ = on_two_ranks
    sampled = {f"causal.{name}": tensor for name, tensor in found["sampler"].items()}
    assert_same(sampled, found[3]["policy"], atol=0, rtol=0)


@pytest.mark.integration
def test_bf16_under_zero_stays_near(on_two_ranks):
    found, given = on_two_ranks
    rollout = given["rollout"]
    with torch.no_grad():
        exact, _ = given["policy"](rollout.tokens_BT, rollout.mask_BT, 9, 0.7)
    gap = (found["bf16_logprobs"] - exact)[rollout.response_mask_BR].abs().max()
    assert 1e-4 < gap < 0.2
    moved = [(found["bf16"][name] - tensor).abs().max() for name, tensor in weights(given["policy"]).items()]
    assert 1e-3 < max(moved) < 1
    assert all(tensor.dtype == torch.float32 for tensor in found["bf16"].values())


def main(folder):
    """A rank: all that the tests above ask of two ranks, in one process group."""
    from rlhf.distributed import collectives

    module.import_deepspeed()
    torch.set_num_threads(1)
    shard_everything()
    given = torch.load(folder / "given.pt", weights_only=False)
    rank = collectives.rank()
    found = {}
    for stage in (0, 2, 3):
        hardware = HARDWARE.model_copy(update={"zero_stage": stage})
        found[stage] = after_update(given, hardware, is_local=False)
        policy, _ = found[stage].pop("engines")
        found[stage] |= resume(policy, folder / f"stage-{stage}", given, hardware)
        frozen = open_engine(copy.deepcopy(given["critic"]), None, STEPS, hardware, local=False)
        found[stage]["values"] = frozen(given["rollout"].tokens_BT, given["rollout"].mask_BT)
        if stage == 3:
            policy.load(folder / "stage-3")
            found |= gather(policy.module, given)
    found |= in_bf16(given)
    if rank == 0:
        torch.save(found, folder / "found.pt")


def shard_everything():
    """ZeRO-3 keeps parameters as small as ours whole on every rank, unless told not to."""
    zero_config = module.zero_config

    def sharp(*arguments):
        config = zero_config(*arguments)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    module.zero_config = sharp


def resume(engine, folder, given, hardware):
    """The weights after one more step, of an engine that goes on and of a new one that loads its checkpoint."""
    from rlhf.distributed import collectives

    engine.save(folder)
    collectives.barrier()
    other = open_engine(copy.deepcopy(given["policy"]), OPTIM, STEPS, hardware, local=False)
    other.load(folder)
    after = []
    for each in (engine, other):
        rollout = given["rollout"]
        logprobs, _ = each(rollout.tokens_BT, rollout.mask_BT, 9, 0.7)
        each.backward(logprobs.sum(), 72, last=True)
        each.step()
        after.append(full_state(each.module))
    return {"next": after[0], "resumed": after[1]}


def gather(sharded, given):
    """A sampler fed from shards, and the most bytes that were whole at one time."""
    from rlhf.generation import InProcessSampler

    module.BUCKET_BYTES, most = 4096, 0
    sampler = InProcessSampler(copy.deepcopy(given["policy"].causal), [2], 0)
    with torch.no_grad():
        for parameter in sampler.model.parameters():
            parameter.zero_()

    def watched():
        nonlocal most
        for name, tensor in full_parameters(sharded):
            most = max(most, sum(4 * p.numel() for p in sharded.parameters()))  # a shard that is not gathered has 0
            yield name.removeprefix("causal."), tensor

    sampler.load_weights(watched())
    return {"sampler": full_state(sampler.model), "gathered_at_once": most, "bucket_bytes": 4096}


def in_bf16(given):
    hardware = HARDWARE.model_copy(update={"precision": "bf16"})
    rollout = given["rollout"]
    frozen = open_engine(copy.deepcopy(given["policy"]), None, STEPS, hardware, local=False)
    with torch.no_grad():
        logprobs, _ = frozen(rollout.tokens_BT, rollout.mask_BT, 9, 0.7)
    return {
        "bf16_logprobs": logprobs,
        "bf16": after_update(given, hardware, is_local=False)["policy"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
