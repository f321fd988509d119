"""Bytes of live tensors at the worst moment of each phase of PPO, as the stage's own functions allocate them.

Every storage that an operation makes is followed by a weak reference. What no operation returns is not seen: the insides
of kernels and oneDNN's packed weights.
"""

import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PHASES = ("opening", "sampling", "scoring", "update", "saving", "finishing")


class LiveBytes(TorchDispatchMode):
    """`now`: bytes of the storages that operations have made and that still exist; `peak`: the most since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.layout is torch.strided:
                self.follow(x.untyped_storage())
        return out

    def follow(self, storage) -> None:
        key = storage._cdata  # of a new storage it may be that of one that is gone
        size = storage.nbytes()
        if key in self.sizes:
            self.now += size - self.sizes[key]  # a storage can be resized
            self.sizes[key] = size
        else:
            self.sizes[key] = size
            self.now += size
            weakref.finalize(storage, self.forget, key)
        self.peak = max(self.peak, self.now)

    def __enter__(self):
        """Weights that are mapped from a file come from no operation; they count when they become parameters."""
        self.make = torch.nn.Parameter.__new__

        def noted(*args, **kwargs):
            made = self.make(*args, **kwargs)
            if made.device.type == "cpu":
                self.follow(made.untyped_storage())
            return made

        torch.nn.Parameter.__new__ = staticmethod(noted)
        return super().__enter__()

    def __exit__(self, *error):
        torch.nn.Parameter.__new__ = self.make
        return super().__exit__(*error)

    def forget(self, key) -> None:
        self.now -= self.sizes.pop(key, 0)

    def restart(self) -> None:
        gc.collect()
        self.peak = self.now


def peaks(config, folders, local=True):
    """Phase → bytes of this process, alone (`local`) or as a rank of DeepSpeed's."""
    from rlhf.algorithms.advantages import ADVANTAGES
    from rlhf.generation import sampler_of
    from rlhf.models import load_tokenizer
    from rlhf.ppo import best, scoring
    from rlhf.ppo.experience import make_experience
    from rlhf.ppo.models import open_models
    from rlhf.ppo.setup import reward_set
    from rlhf.ppo.update import update
    from rlhf.ppo.weight_sync import sync_weights
    from rlhf.rewards import Responses

    ppo, found, cpu = config.ppo, {}, torch.device("cpu")
    context = SimpleNamespace(
        inputs={"sft": SimpleNamespace(path=folders["sft"])}, device=cpu, local=local, open_pool=None
    )
    gc.collect()
    with LiveBytes() as live:

        def end(phase):
            found[phase] = live.peak
            live.restart()

        models = open_models(config, cast(Any, context), {n: folders[n] for n in ("helpfulness", "safety")})
        end("opening")
        sync_weights(models.policy, models.sampler)
        if local:  # DeepSpeed makes its own at once
            make_moments(models)
        live.restart()
        batch = prompts(ppo.batch_size, ppo.max_prompt_length)
        models.sampler.stop_ids = [-1]  # every response is as long as it may be
        rollout = models.sampler.sample(batch, ppo.sampling, 0, 1)
        end("sampling")
        rewards = reward_set(config, models)
        said = rewards(Responses(rollout, [], []))
        scores = scoring.score_rollout(rollout, models, said, ppo)
        end("scoring")
        combined = rewards.combine(scores.rewards_BN, scores.failed_BN, torch.arange(len(rollout.tokens_BT)) % 2 == 0)
        experience, _ = make_experience(rollout, scores, combined, ADVANTAGES["gae"], ppo, kl_coef=0.1)
        live.restart()
        update(models.policy, models.critic, experience, ppo, (0, 1), 0.0)
        end("update")
        best.save(folders["out"], models)
        end("saving")
        sampler = sampler_of(folders["sft"], models.sampler, config, load_tokenizer(folders["sft"]), cpu)
        sampler.stop_ids = [-1]
        sampler.sample(batch, ppo.sampling, 0, 1)
        end("finishing")
    return found


def make_moments(models):
    """Those of plain torch, which would otherwise exist after the first update only."""
    for engine in models.engines().values():
        if (optimizer := getattr(engine, "optimizer", None)) is not None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()


def prompts(rows, length):
    from rlhf.data.batches import PromptBatch

    tokens_BP = torch.randint(10, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    ids_B = torch.arange(rows)
    return PromptBatch(tokens_BP, torch.ones_like(tokens_BP, dtype=torch.bool), ids_B % 2 == 0, ids_B)
