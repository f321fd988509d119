"""PPOTrainer: sample → score → experience → update, with held-out evaluation, checkpoints, checks and alarms.

Llama 2, §3.2.3; what was not published is marked in rlhf/config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch

from rlhf.algorithms.kl import adaptive_kl_coef
from rlhf.config import PPOConfig
from rlhf.data.batches import Rollout, Scores, to
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.ppo import alarms, best, preflight_checks, step_profiler
from rlhf.ppo.evaluator import Evaluator
from rlhf.ppo.experience import make_experience, reward_metrics
from rlhf.ppo.notebook_setup import local_setup
from rlhf.ppo.rollout_source import RolloutSource
from rlhf.ppo.scoring import score_responses
from rlhf.ppo.setup import Setup
from rlhf.ppo.step_profiler import PhaseTimer
from rlhf.ppo.tables import sampled
from rlhf.ppo.update import update
from rlhf.ppo.weight_sync import sync_weights
from rlhf.runs import checkpoint
from rlhf.runs.artifacts import link_tree
from rlhf.tracking import NOTHING

CPU = torch.device("cpu")


@dataclass
class TrainerState:
    """Everything that a checkpoint keeps besides the models."""

    kl_coef: float
    iteration: int = 0
    best: float | None = None  # held-out reward
    best_iteration: int = 0
    since_best: int = 0  # evaluations
    first_entropy: float | None = None
    alarms: list[dict[str, Any]] = field(default_factory=list)


class PPOTrainer:
    """Trains a policy with PPO or a similar algorithm (`config.advantage`) to maximise its rewards.

        trainer = PPOTrainer("path/to/model", rewards={"short": short}, prompts=texts,
                             config=PPOConfig(iterations=20, advantage="grpo", group_size=4))
        trainer.train()
        trainer.save("out")

    `model`: a folder, a hub name, or a model and its tokenizer. `rewards`: name → a function
    (`rlhf.rewards.FunctionReward` says how it is called) or an `rlhf.RewardModel`; their sum is maximised. `prompts`:
    texts, or rows with `prompt` or `messages` and columns for the rewards. `held_out`: prompts that select the best
    policy; without them the last one is kept. `folder`: for metrics and checkpoints, from which training resumes; None
    keeps them in memory.

    UserError if settings, prompts, rewards or the model cannot be used.
    """

    def __init__(
        self,
        model: Any,
        *,
        rewards: Mapping[str, Any],
        prompts: Sequence[Any],
        config: PPOConfig | None = None,
        held_out: Sequence[Any] = (),
        folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self._open(local_setup(model, rewards, (prompts, held_out), config or PPOConfig(), folder, seed))

    @classmethod
    def of(cls, setup: Setup) -> Self:
        """A trainer with the models of a stage. All ranks must call it."""
        trainer = cls.__new__(cls)
        trainer._open(setup)
        return trainer

    def _open(self, setup: Setup) -> None:
        self._setup = setup
        self.config, self.context, self.models, self.rewards = setup.config, setup.context, setup.models, setup.rewards
        self.held_out = setup.held_out
        self.timer = PhaseTimer(self.context.device)
        self.machine = step_profiler.all_machines(self.context.device, self.config.hardware.precision)
        models = self.models
        self.source = RolloutSource(self.config, models.sampler, models.tokenizer, setup.prompts, self.timer)
        self.evaluator = Evaluator(self.config, self.context, models, self.rewards)
        self.state = TrainerState(kl_coef=self.config.ppo.kl_coef)
        self.history: list[dict[str, float]] = []  # the metrics of each iteration since the trainer was made

    def train(self) -> Self:
        """Trains until `iterations` are done, or until the held-out reward has not improved for `patience`
        evaluations."""
        ppo, state = self.config.ppo, self.state
        self._restore()
        self.context.tracker.tags(preflight_checks.run(self._setup, fresh=state.iteration == 0))
        if state.best is None and self.held_out:
            self._evaluate()
        self.timer.restart()
        while state.iteration < ppo.iterations and state.since_best < ppo.patience:
            state.iteration += 1
            metrics = self.step()
            with self.timer("logging"):
                self.context.tracker.metrics(metrics, step=state.iteration)
                self._watch(metrics)
            if self.held_out and (state.iteration % ppo.eval_every == 0 or state.iteration == ppo.iterations):
                with self.timer("evaluation"):
                    sync_weights(self.models.policy, self.models.sampler)
                    self._evaluate()
            with self.timer("logging"):
                shown = {"reward": metrics["ppo/reward"], "kl": metrics["ppo/kl"]}
                self.context.progress.update(state.iteration, ppo.iterations, **shown)
            if state.iteration % ppo.checkpoint_every == 0:
                with self.timer("checkpoint"):
                    self._save_checkpoint()
            profile = step_profiler.close(self.timer, metrics, self.machine)
            self.context.tracker.metrics(profile, step=state.iteration)
            self.history.append(metrics | profile)
        return self

    def step(self) -> dict[str, float]:
        """One iteration: sample → score → experience → update. Returns its metrics."""
        config, models, state, timer = self.config, self.models, self.state, self.timer
        with timer("sync"):
            sync_bytes = sync_weights(models.policy, models.sampler)
        sample = self.source.next(state.iteration)
        with timer("scoring"):
            scores = score_responses(sample.rollout, sample.prompts, models, self.rewards, config.ppo)
            rollout = collectives.gather_rows(to(sample.rollout, CPU))
            scores = collectives.gather_rows(scores)
        combined = self.rewards.combine(scores.rewards_BN, scores.failed_BN, sample.batch.is_safety_B)
        # On one rank, because branches depend on floats, and the KL changes β.
        experience, metrics = collectives.broadcast_result(
            lambda: make_experience(rollout, scores, combined, config.ppo, state.kl_coef)
        )
        with timer("logging"):
            metrics |= reward_metrics([*self.rewards.rewards], scores)
            metrics |= step_profiler.work(
                rollout, models.sampler, models.all_scoring, models.trainable, config, state.iteration
            )
            self._log_samples(rollout, scores)
        with self.source.prefetching(state.iteration + 1) as go_on:
            key = (config.seed, state.iteration)
            metrics |= update(models.policy, models.critic, experience, config.ppo, key, state.kl_coef, go_on)
        metrics |= {"ppo/kl_coef": state.kl_coef, "ppo/staleness": float(sample.staleness)}
        metrics["perf/sync_bytes"] = float(sync_bytes)
        if (target := config.ppo.kl_target) is not None:
            batch_size = config.ppo.batch_size
            state.kl_coef = adaptive_kl_coef(
                state.kl_coef, metrics["ppo/kl"], target.target, target.horizon, batch_size
            )
        return metrics

    def save(self, folder: str | Path) -> Path:
        """Saves the policy as an ordinary transformers folder, with its critic in `critic/`: the best one if there are
        held-out prompts, else the current one. All ranks must call it."""
        folder = Path(folder)
        if self.state.best is not None:
            folder.mkdir(parents=True, exist_ok=True)
            collectives.rank_zero_only(lambda: link_tree(self.best_folder, folder), f"writing {folder}")
        else:
            best.save(folder, self.models)
        return folder

    @property
    def best_folder(self) -> Path:
        """The policy with the best held-out reward so far."""
        return checkpoint.best_folder(self.context.checkpoint_folder, self.state.best_iteration)

    def _parts(self) -> dict[str, checkpoint.Part]:
        return {**self.models.engines(), "prefetched": self.source.prefetched}

    def _restore(self) -> None:
        """Resumes from the newest checkpoint, if there is one."""
        restored = checkpoint.restore(self.context.checkpoint_folder, self._parts())
        self.context.tracker.rewind(restored["iteration"] if restored else NOTHING)
        for name in (f.name for f in fields(TrainerState) if restored):
            setattr(self.state, name, restored[name])  # type: ignore[index]
        sync_weights(self.models.policy, self.models.sampler)
        for entry in self.state.alarms:
            self.context.progress.warn(alarms.line(entry))

    def _save_checkpoint(self) -> None:
        state = asdict(self.state)
        checkpoint.save(self.context.checkpoint_folder, state.pop("iteration"), self._parts(), state)

    def _evaluate(self) -> None:
        """Evaluates the sampler's policy on the held-out prompts, and keeps it if it is the best so far."""
        state = self.state
        reward = self.evaluator.reward(self.held_out, state.iteration)
        state.since_best += 1
        if state.best is None or reward > state.best:
            state.best, state.best_iteration, state.since_best = reward, state.iteration, 0
            best.keep(self.context.checkpoint_folder, self.models, state.iteration)

    def _log_samples(self, rollout: Rollout, scores: Scores) -> None:
        ppo, iteration, names = self.config.ppo, self.state.iteration, [*self.rewards.rewards]
        if self.context.is_writer and (iteration - 1) % ppo.eval_every == 0:
            table = sampled(self.models.tokenizer, rollout, scores, names, ppo.logged_samples, iteration)
            self.context.tracker.table("samples", table)

    def _watch(self, metrics: dict[str, float]) -> None:
        """Reports the alarms of the iteration, each once as a tag and a warning. UserError (6) if training must
        stop."""
        limits, state = self.config.ppo.alarms, self.state
        metrics = collectives.broadcast_result(lambda: metrics)  # times differ
        alarms.refuse_not_finite(metrics, state.iteration)
        if state.first_entropy is None:
            state.first_entropy = metrics["ppo/entropy"]
        known = {entry["name"] for entry in state.alarms}
        sounding = alarms.sounding(metrics, state.first_entropy, limits)
        state.alarms = alarms.noted(state.alarms, sounding, state.iteration)
        new = [alarms.line(entry) for entry in state.alarms if entry["name"] not in known]
        for entry in (entry for entry in state.alarms if entry["name"] not in known):
            self.context.tracker.tags({f"alarm.{entry['name']}": alarms.line(entry)})
            self.context.progress.warn(alarms.line(entry))
        if new and limits.stop:
            raise UserError("stopped by an alarm (ppo.alarms.stop): " + "\n".join(new), 6)
