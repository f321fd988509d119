"""What one rank decides, all do: rank 1 would answer otherwise, and follows rank 0 without waiting for ever.

Two ranks of gloo per decision, in processes of their own. Where a decision picks the way, a collective follows on each.
"""

from __future__ import annotations

import json
import multiprocessing
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reward_data import Message, Prompt
from rlhf import models
from rlhf.algorithms.advantages import ADVANTAGES
from rlhf.config import AlarmConfig
from rlhf.data.batches import Rollout, Scores
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.evaluation.policy_report import HeldOutResponses
from rlhf.ppo import trainer
from rlhf.ppo.evaluator import Evaluator
from rlhf.ppo.rollout_source import Prefetched
from rlhf.ppo.step_profiler import PhaseTimer
from rlhf.ppo.trainer import PPOTrainer, TrainerState
from rlhf.rewards import Combined
from rlhf.runs import artifacts, checkpoint, provenance
from rlhf.runs.artifacts import write_json
from stages import trl_trainer

LIMIT_S = 15

pytestmark = pytest.mark.integration


CPU = torch.device("cpu")


class Quiet:
    """A tracker, a progress bar, or anything else that is only told things."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def checkpoints(folder: Path) -> None:
    """Two whole ones, and one that only rank 1 will take for whole."""
    for number in (1, 2, 3):
        target = folder / f"iteration-{number:06d}"
        target.mkdir(parents=True)
        (target / "trainer_state.json").write_text("{}")
        if number < 3:
            checkpoint.write_json(target / "state.json", checkpoint._sealed({"iteration": number, "files": {}}))


def older_on_rank_1() -> None:
    if collectives.rank() == 1:
        listed = checkpoint.complete
        checkpoint.complete = lambda folder: listed(folder)[:1]  # a listing that is behind


# --- decisions: what a rank does, and what must come out on both -------------------------------------------------------


def newest(folder: Path) -> Any:
    older_on_rank_1()
    found = checkpoint.newest(folder)
    return found and found.name


def unseen(folder: Path) -> Any:
    """Rank 1 does not see the file that makes a checkpoint whole."""
    if collectives.rank() == 1:
        checkpoint._is_committed = lambda path: False
    try:
        checkpoint.newest(folder)
    except UserError as error:
        return [error.exit_code, "rank 1" in error.message]
    return None


def restored_state(folder: Path) -> Any:
    """PPO goes on with the state that rank 0 reads."""
    if collectives.rank() == 1:
        read = checkpoint._state
        checkpoint._state = lambda path: checkpoint._sealed({"iteration": 1, "files": read(path)["files"]})
    return (checkpoint.restore(folder, {}) or {})["iteration"]


def trainer_resumes(folder: Path) -> Any:
    """SFT and reward models: the folder that the Trainer is told to go on from."""
    older_on_rank_1()
    told: dict[str, Any] = {}
    trainer = SimpleNamespace(
        remove_callback=lambda *_: None,
        add_callback=lambda *_: None,
        train=lambda resume_from_checkpoint: told.update(start=Path(resume_from_checkpoint).name),
    )
    trl_trainer.fit(trainer, SimpleNamespace(context=SimpleNamespace(checkpoint_folder=folder, tracker=Quiet())))  # type: ignore[arg-type]
    return told["start"]


def prefetched(folder: Path) -> Any:
    """An old file lies there for rank 1; rank 0 has prefetched nothing."""
    (folder / "rank-1.pt").write_bytes(b"old")
    kept = Prefetched()
    kept.load(folder)
    return kept.rollout is None


def held_out_reward(folder: Path) -> Any:
    """What is compared with the best so far."""
    worth = 0.5 + collectives.rank()
    answers = HeldOutResponses(["a"], [1], [True], {"reward.h": [worth]}, [0.0], None)
    combined = Combined(torch.tensor([worth]), torch.tensor([False]))
    evaluator = Evaluator(None, SimpleNamespace(tracker=Quiet(), is_writer=False), Quiet(), None)  # type: ignore[arg-type]
    evaluator._evaluate = lambda *_: (answers, combined)  # type: ignore[method-assign]
    reward = evaluator.reward([Prompt((Message("user", "a"),), "helpful", "p:1")], 1)
    if reward > 1.0:  # as where a better policy is kept: its shards are gathered
        collectives.barrier()
    return reward


def a_trainer(ppo: Any) -> PPOTrainer:
    """A trainer of which nothing is opened yet."""
    made: Any = PPOTrainer.__new__(PPOTrainer)
    made.config = SimpleNamespace(ppo=ppo, seed=0)
    made.context = SimpleNamespace(tracker=Quiet(), progress=Quiet(), is_writer=False, device=CPU)
    made.state = TrainerState(kl_coef=0.1, iteration=2)
    return made


def alarm(folder: Path) -> Any:
    """A figure that is no number on rank 1 alone stops nobody, one of rank 0 stops both."""
    limits = AlarmConfig(kl_max=50, eos_rate_min=0, entropy_ratio_min=0, reward_failed_fraction_max=0.9, stop=True)
    said = []
    for bad in (1, 0):
        names = ("kl", "eos_rate", "entropy", "rollout_logprob_diff_max", "rollout_logprob_diff_mean", "staleness")
        metrics = {f"ppo/{name}": 0.5 for name in (*names, "reward_failed_fraction")}
        if collectives.rank() == bad:
            metrics["ppo/kl"] = float("nan")
        try:
            a_trainer(SimpleNamespace(alarms=limits))._watch(metrics)
            collectives.barrier()
            said.append("goes on")
        except UserError as error:
            said.append(error.exit_code)
    return said


def experience(folder: Path) -> Any:
    """Rewards and the KL, which moves β and sounds alarms, come from one rank."""
    kl = 9.0 if collectives.rank() == 1 else 1.0
    trainer.make_experience = lambda *_: (None, {"ppo/kl": kl})  # type: ignore[assignment]
    trainer.score_responses = lambda *_: scores()  # type: ignore[assignment]
    trainer.step_profiler.work = lambda *_: {}  # type: ignore[assignment]
    trainer.update = lambda *_: {}  # type: ignore[assignment]
    trainer.sync_weights = lambda *_: 0
    settings = SimpleNamespace(batch_size=2, eval_every=9, kl_target=SimpleNamespace(target=1.0, horizon=10.0))
    made: Any = a_trainer(settings)
    made.estimator = ADVANTAGES["gae"]
    made.models = SimpleNamespace(policy=None, critic=None, sampler=None, all_scoring=[], trainable=[])
    made.rewards, made.timer = SimpleNamespace(rewards={"h": None}, combine=lambda *_: None), PhaseTimer(CPU)
    sampled = SimpleNamespace(rollout=rollout(), prompts=[], batch=SimpleNamespace(is_safety_B=None), staleness=0)
    made.source = SimpleNamespace(next=lambda _: sampled, prefetching=lambda _: nullcontext())
    metrics = made.step()
    return [metrics["ppo/kl"], round(made.state.kl_coef, 6)]


def scores() -> Scores:
    ones = torch.ones(1, 1)
    return Scores(ones, ones, ones, ones, ones.bool())


def rollout() -> Rollout:
    ones = torch.ones(1, 2)
    return Rollout(ones.long(), ones.bool(), ones[:, :1].bool(), ones[:, :1], torch.ones(1).bool())


def tiny_model(folder: Path) -> Any:
    """Rank 1 reads other texts, of which it would make another tokenizer."""
    models.make_tiny = lambda config: folder / f"base-of-rank-{collectives.rank()}"  # type: ignore[assignment]
    return models.resolve(SimpleNamespace(model=SimpleNamespace(path="tiny"))).name  # type: ignore[arg-type]


def sealed(folder: Path) -> Any:
    """Rank 1 does not see yet what rank 0 has just written."""
    if collectives.rank() == 1:
        artifacts.load = lambda path: None  # type: ignore[assignment]
    provenance.settings_digest = lambda *_: "same"  # type: ignore[assignment]
    context: Any = SimpleNamespace(
        artifact_folder=folder / "sft", stage="sft", checkpoint_folder=folder / "none", roles=()
    )
    write: Any = lambda path: write_json(path / "weights.json", {})
    made = provenance.commit(SimpleNamespace(), context, {}, {}, write=write)  # type: ignore[arg-type]
    return made and made.kind


def refused(folder: Path) -> Any:
    """What rank 0 refuses, all refuse: nobody is left waiting."""

    def decide() -> None:
        raise UserError("no", 4)

    try:
        collectives.broadcast_result(decide)
    except UserError as error:
        return [error.message, error.exit_code]
    return None


DECISIONS = {
    newest: "iteration-000002",
    unseen: [5, True],
    restored_state: 2,
    trainer_resumes: "iteration-000002",
    prefetched: True,
    held_out_reward: 0.5,
    alarm: ["goes on", 6],
    experience: [1.0, 0.1],
    tiny_model: "base-of-rank-0",
    sealed: "sft",
    refused: ["no", 4],
}


def on_a_rank(rank: int, decide: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    said = decide(folder / "run")
    collectives.barrier()  # a rank on another way would be in another collective now
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.mark.parametrize(("decide", "wanted"), DECISIONS.items(), ids=[decide.__name__ for decide in DECISIONS])
def test_all_ranks_follow_the_first(decide: Any, wanted: Any, tmp_path: Path) -> None:
    checkpoints(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=on_a_rank, args=(rank, decide, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
    hang = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hang, f"ranks {hang} wait for ever"
    said = [tmp_path / f"said-{rank}.json" for rank in range(2)]
    assert [json.loads(path.read_text()) for path in said if path.exists()] == [wanted, wanted]
