"""One seed, one PPO trajectory: ranks, accumulation, forward passes, packing and engine change nothing but rounding.

Every layout runs the program's own `open_models` and `PPOTrainer.step` (sample, score, make_experience, update) on the same
small Llamas, and is compared with one process of plain torch that reads a minibatch in one padded pass.

The file is also the program of each rank: `test_layout.py FOLDER`. The whole matrix, with its table:
`pytest -m proof -s tests/proofs/test_layout.py`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reward_data import Message, Prompt
from rlhf.config import OptimConfig, RunConfig
from tests.proofs.trajectory import TOLERANCE, Trajectory, differences
from tests.worker_group import leave, run_ranks

BATCH, MINIBATCH, EPOCHS, LONGEST = 32, 16, 2, 40
LEARN = OptimConfig(lr=1e-3, schedule="cosine", min_warmup_steps=2)


@dataclass(frozen=True)
class Layout:
    ranks: int = 1
    zero_stage: int | None = None  # None: LocalEngine
    accumulation: int = 1  # forward passes per minibatch, for rows of equal length
    by_tokens: bool = False  # the limit of a forward pass
    packing: bool = False
    recompute: bool = False  # model.gradient_checkpointing
    answers: int = 1  # to each prompt
    advantage: str = "gae"  # another one: with a function as reward that fails for some answers, and without a critic
    off_policy: bool = False  # answers of the next iteration are sampled during the update
    slices: int = 1  # hardware.sequence_parallel
    mean_of_means: bool = False  # a planted fault

    @property
    def engine(self) -> str:
        return "plain torch" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"

    @property
    def kind(self) -> tuple[int, bool, str]:
        """Layouts of one kind make one trajectory."""
        return self.answers, self.off_policy, self.advantage

    @property
    def reference(self) -> Layout:
        return Layout(answers=self.answers, off_policy=self.off_policy, advantage=self.advantage)

    def __str__(self) -> str:
        words = [f"{self.ranks} ranks", self.engine, f"accumulation {self.accumulation}"]
        words += ["tokens" if self.by_tokens else "rows", "packed" if self.packing else "padded"]
        words += [f"{self.answers} answers per prompt"] * (self.answers > 1) + ["recompute"] * self.recompute
        words += [f"sequences over {self.slices}"] * (self.slices > 1)
        words += ["one step off-policy"] * self.off_policy + [self.advantage] * (self.advantage != "gae")
        return ", ".join(words + ["mean of means"] * self.mean_of_means)


QUICK = [
    Layout(accumulation=4, packing=True),
    Layout(accumulation=2, by_tokens=True, packing=True, recompute=True),
    Layout(ranks=2, zero_stage=0, accumulation=2),
    Layout(ranks=2, zero_stage=2, by_tokens=True),
    Layout(ranks=2, zero_stage=3, accumulation=2, by_tokens=True, packing=True, recompute=True),
    Layout(ranks=2, zero_stage=3, accumulation=2, off_policy=True),
    Layout(accumulation=2, packing=True, recompute=True, answers=4),
    Layout(ranks=2, zero_stage=3, accumulation=2, by_tokens=True, packing=True, answers=4),
    Layout(accumulation=2, by_tokens=True, packing=True, answers=4, advantage="grpo"),
    Layout(ranks=2, zero_stage=3, accumulation=2, packing=True, answers=4, advantage="grpo"),
    Layout(ranks=2, zero_stage=3, off_policy=True, answers=4, advantage="grpo"),
    Layout(ranks=2, zero_stage=3, accumulation=2, slices=2),
    Layout(ranks=2, zero_stage=2, accumulation=2, by_tokens=True, packing=True, recompute=True, answers=4, slices=2),
]
FAULTY = Layout(accumulation=4, mean_of_means=True)
ENGINES = [(1, None), *product((1, 2, 4), (0, 2, 3))]
MATRIX = [
    Layout(ranks, stage, accumulation, by_tokens, packing)
    for (ranks, stage), accumulation, by_tokens, packing in product(ENGINES, (1, 2, 4), (False, True), (False, True))
]
MATRIX += [Layout(ranks, stage, 2, True, True, recompute=True) for ranks, stage in ENGINES]
MATRIX += [
    Layout(ranks, stage, 2, by_tokens, True, answers=4) for ranks, stage in ENGINES for by_tokens in (False, True)
]
MATRIX += [
    Layout(ranks, stage, 2, by_tokens, packing, recompute=packing, answers=answers, slices=2)
    for ranks, stage in product((2, 4), (0, 2, 3))
    for by_tokens, packing, answers in ((False, False, 1), (True, True, 1), (True, True, 4))
]
MATRIX += [Layout(ranks, 3, 2, packing=True, answers=4, advantage="grpo", slices=2) for ranks in (2, 4)]
MATRIX += [
    Layout(ranks, stage, 2, packing=True, answers=4, advantage=advantage)
    for advantage, (ranks, stage) in product(("grpo", "dr_grpo", "rloo", "reinforce++"), ENGINES)
]


# --- the program of a rank ------------------------------------------------------------------------------------------


def settings(layout: Layout) -> RunConfig:
    rows = MINIBATCH * layout.slices // (layout.ranks * layout.accumulation)
    ppo = {
        "iterations": 5,
        "batch_size": BATCH,
        "group_size": layout.answers,
        "advantage": layout.advantage,
        "rewards": {} if layout.advantage == "gae" else REWARDS,
        "minibatch_size": MINIBATCH,
        "epochs": EPOCHS,
        "micro_batch_size": rows,
        "micro_batch_tokens": rows * LONGEST if layout.by_tokens else None,
        "packing": layout.packing,
        "sampling": {
            "one_step_off_policy": layout.off_policy,
            "temperature": 0.7,
            "max_new_tokens": 12,
            "batch_size": BATCH // (layout.ranks * layout.accumulation),
        },
        "kl_coef": 0.1,
        "kl_target": {"target": 1.0, "horizon": 100.0},
        "optim": LEARN,
        "critic_optim": LEARN,
    }
    model = {"gradient_checkpointing": layout.recompute}
    data = {role: {"train": []} for role in ("demonstrations", "preferences", "prompts")}
    hardware = {"zero_stage": layout.zero_stage or 0, "workers": layout.ranks, "sequence_parallel": layout.slices}
    return RunConfig.model_validate(
        {"name": "x", "seed": 3, "data": data, "ppo": ppo, "model": model, "hardware": hardware}
    )


REWARDS = {
    "model": {"model": "helpfulness", "weight": 0.5},
    "words": {"function": f"{__file__}:fails_for_some"},
}


def fails_for_some(prompts: list[str], responses: list[str]) -> list[float | None]:
    """None for about one response in five, whichever rank has it."""
    sizes = [len(prompt) + 3 * len(response) for prompt, response in zip(prompts, responses, strict=True)]
    return [None if size % 5 == 0 else size % 7 - 3.0 for size in sizes]


def prompts() -> list[Prompt]:
    """Fewer than an iteration draws, so that some come twice; of 1 to 20 words."""
    texts = [" ".join(["how", "are", "you"][(i + k) % 3] for k in range(1 + (7 * i) % 20)) for i in range(20)]
    tags = ("helpful", "helpful", "safety")
    return [Prompt((Message("user", text),), tags[i % 3], f"row {i}") for i, text in enumerate(texts)]


def run(layout: Layout, folder: Path, rank: int, iterations: int) -> Trajectory:
    from rlhf.ppo.models import open_models
    from rlhf.ppo.setup import Setup, reward_set
    from rlhf.ppo.trainer import PPOTrainer
    from tests.whole import full_state

    config, found = settings(layout), Trajectory()
    inputs: Any = {name: SimpleNamespace(path=folder / name) for name in MODELS}
    context: Any = SimpleNamespace(
        rank=rank,
        world_size=layout.ranks,
        device=torch.device("cpu"),
        inputs=inputs,
        is_writer=False,
        local=layout.zero_stage is None,
        open_pool=None,
    )
    named = dict.fromkeys(config.ppo.reward_models.values())
    models = open_models(config, context, {name: folder / "reward" / name for name in named})
    learners = models.engines()

    def weights() -> dict[str, Tensor]:
        states = {name: full_state(engine.module) for name, engine in learners.items()}
        return {f"{model}.{name}": tensor for model, state in states.items() for name, tensor in state.items()}

    for name, engine in learners.items():
        watch_steps(name, engine, found)
    found.start = weights()
    trainer = PPOTrainer.of(Setup(config, context, models, reward_set(config, models), prompts(), held_out=[]))
    with pytest.MonkeyPatch.context() as patch:
        watch_answers(patch, found)
        if layout.mean_of_means:
            plant_mean_of_means(patch, learners, passes=layout.ranks * layout.accumulation)
        for iteration in range(1, iterations + 1):
            trainer.state.iteration = iteration
            found.metrics.append(trainer.step())
    found.weights = weights()
    return found


def watch_answers(patch: pytest.MonkeyPatch, found: Trajectory) -> None:
    from rlhf.ppo import trainer

    make_experience = trainer.make_experience

    def watched(rollout: Any, *rest: Any) -> Any:
        found.answers.append(rollout.tokens_BT)
        return make_experience(rollout, *rest)

    patch.setattr(trainer, "make_experience", watched)


def watch_steps(model: str, engine: Any, found: Trajectory) -> None:
    """Before each optimizer step the gradient over all ranks and passes goes into `found`."""
    step = engine.step

    def watched() -> float:
        if model == "policy":  # steps first
            found.gradients.append({})
        for name, parameter in engine.module.named_parameters():
            found.gradients[-1][f"{model}.{name}"] = full_gradient(parameter)
        return step()

    engine.step = watched


def full_gradient(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.grad is not None:
        return parameter.grad.detach().clone()
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(parameter)
    assert gradient is not None
    return gradient.detach().clone()


def plant_mean_of_means(patch: pytest.MonkeyPatch, learners: dict[str, Any], passes: int) -> None:
    """Each forward pass is divided by its own count of tokens, and the step by the number of passes."""
    from rlhf.ppo import update

    def mean(loss: Callable[..., Any]) -> Callable[..., Any]:
        def of(*arguments: Any) -> Any:
            whole = loss(*arguments)
            return dataclasses.replace(whole, sum=whole.sum / whole.count)

        return of

    def divided(backward: Callable[..., None]) -> Callable[..., None]:
        return lambda loss, count, last: backward(loss, passes, last)

    patch.setattr(update, "policy_loss", mean(update.policy_loss))
    patch.setattr(update, "value_loss", mean(update.value_loss))
    for engine in learners.values():
        patch.setattr(engine, "backward", divided(engine.backward))


# --- worker groups --------------------------------------------------------------------------------------------------

MODELS = ("sft", "reward/helpfulness", "reward/safety")


def make_models(folder: Path) -> None:
    """Llamas of two layers with opinions; their answers end after 1 to 12 tokens, and some do not end."""
    from rlhf.config import TinyConfig
    from rlhf.models import ScalarModel, save_causal
    from rlhf.models.tiny import train_tokenizer, untrained_llama

    shape = TinyConfig(vocab_size=280, hidden_size=16, intermediate_size=24, layers=2, heads=2)
    tokenizer = train_tokenizer(["how are you"] * 9, shape.vocab_size)
    for seed, name in enumerate(MODELS):
        torch.manual_seed(seed)
        llama = untrained_llama(shape, tokenizer, seed)
        for parameter in llama.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.25)
        torch.nn.init.normal_(llama.lm_head.weight.data[tokenizer.eos_token_id], std=1.0)
        if name == "sft":
            save_causal(llama, folder / name, tokenizer)
        else:
            ScalarModel(llama.model, torch.randn(1, 16) / 4).save(folder / name, tokenizer)


def compare_all(layouts: Sequence[Layout], iterations: int, folder: Path) -> dict[Layout, dict[str, float]]:
    """The differences of every layout from its reference. Plain torch runs here, ZeRO in a worker group for each number of
    ranks, one after the other."""
    make_models(folder)
    expected = {
        layout.kind: run(layout, folder, 0, iterations)
        for layout in dict.fromkeys(layout.reference for layout in layouts)
    }
    here = [layout for layout in layouts if layout.zero_stage is None]
    found = {layout: differences(run(layout, folder, 0, iterations), expected[layout.kind]) for layout in here}
    for ranks in (1, 2, 4):
        if own := [layout for layout in layouts if layout.ranks == ranks and layout not in here]:
            given = {
                "expected": {kind: vars(trajectory) for kind, trajectory in expected.items()},
                "layouts": [vars(layout) for layout in own],
                "iterations": iterations,
            }
            torch.save(given, folder / "given.pt")
            run_ranks(__file__, folder, ranks)
            found |= dict(zip(own, torch.load(folder / "found.pt"), strict=True))
    return found


def main(folder: Path) -> None:
    """A rank: all layouts of its number of ranks, in one process group."""
    torch.set_num_threads(1)
    rank, given = int(os.environ["RANK"]), torch.load(folder / "given.pt", weights_only=False)
    shard_everything()
    expected = {kind: Trajectory(**trajectory) for kind, trajectory in given["expected"].items()}
    layouts = [Layout(**layout) for layout in given["layouts"]]
    trajectories = [run(layout, folder, rank, given["iterations"]) for layout in layouts]
    if rank == 0:  # which alone makes the experience, so that the others hold no answers of all ranks
        pairs = zip(layouts, trajectories, strict=True)
        torch.save([differences(found, expected[layout.kind]) for layout, found in pairs], folder / "found.pt")


def shard_everything() -> None:
    """ZeRO-3 keeps parameters as small as ours whole on every rank, unless told not to."""
    from rlhf.distributed import engine

    zero_config = engine.zero_config

    def sharp(*arguments: Any) -> dict[str, Any]:
        config = zero_config(*arguments)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    engine.zero_config = sharp


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, dict[str, float]]:
    return compare_all([*QUICK, FAULTY], iterations=2, folder=tmp_path_factory.mktemp("layouts"))


def assert_within_tolerance(found: dict[str, float]) -> None:
    assert all(found[name] <= limit for name, limit in TOLERANCE.items()), found


@pytest.mark.integration
@pytest.mark.parametrize("layout", QUICK, ids=str)
def test_a_layout_changes_nothing(quick: dict[Layout, dict[str, float]], layout: Layout) -> None:
    assert_within_tolerance(quick[layout])


@pytest.mark.integration
def test_scores_fail_in_every_iteration_and_never_all_of_them(tmp_path: Path) -> None:
    """What the layouts of the estimators without a critic stand on."""
    make_models(tmp_path)
    found = run(Layout(answers=4, advantage="grpo"), tmp_path, 0, 2)
    assert all(0.05 < metrics["ppo/reward_failed_fraction"] < 0.5 for metrics in found.metrics)
    assert not any(name.startswith("critic") for name in found.weights)


@pytest.mark.integration
def test_a_mean_of_means_is_far_outside(quick: dict[Layout, dict[str, float]]) -> None:
    """The control: these tolerances see the mistake that they are there for."""
    assert all(quick[FAULTY][name] > 100 * limit for name, limit in TOLERANCE.items())


@pytest.mark.proof
@pytest.mark.timeout(0)
def test_no_layout_of_the_whole_matrix_changes_anything(tmp_path: Path) -> None:
    found = compare_all([*MATRIX, FAULTY], iterations=5, folder=tmp_path)
    print(table(found))
    assert len(found) == len(MATRIX) + 1
    assert found[FAULTY]["gradients"] > 100 * TOLERANCE["gradients"]
    for layout in MATRIX:
        assert_within_tolerance(found[layout])


def table(found: dict[Layout, dict[str, float]]) -> str:
    """Largest differences over the layouts of one number of ranks and one engine."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for layout, difference in found.items():
        fault = " (mean of micro-batch means)" if layout.mean_of_means else ""
        groups.setdefault((str(layout.ranks), layout.engine + fault), []).append(difference)
    rows = [["ranks", "engine", "layouts", *TOLERANCE], ["---"] * (3 + len(TOLERANCE))]
    for group, members in groups.items():
        rows.append([*group, str(len(members)), *(f"{max(m[name] for m in members):.1g}" for name in TOLERANCE)])
    return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
