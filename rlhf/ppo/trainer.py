"""PPOTrainer: sample → score → experience → update, with held-out evaluation, checkpoints, checks and alarms.

Llama 2, §3.2.3; what was not published is marked in rlhf/config.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from rlhf.algorithms.kl import adaptive_kl_coef
from rlhf.config import PPOConfig
from rlhf.data.batches import Rollout, Scores, to
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.ppo import alarms, best, preflight_checks, step_profiler
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.evaluator import Evaluator
from rlhf.ppo.experience import make_experience, reward_metrics
from rlhf.ppo.notebook_setup import local_setup, run_config
from rlhf.ppo.rollout_source import RolloutSource
from rlhf.ppo.scoring import score_responses
from rlhf.ppo.setup import Setup
from rlhf.ppo.step_profiler import PhaseTimer
from rlhf.ppo.tables import sampled
from rlhf.ppo.update import update
from rlhf.ppo.weight_sync import sync_weights
from rlhf.runs import checkpoint, stopping
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

    `model`: a folder, a hub name, or a model and its tokenizer, which is copied. `rewards`: name → a function
    (`rlhf.rewards.FunctionReward` says how it is called), an `rlhf.RewardModel`, or any `rlhf.rewards.Reward`; or a pair of
    one and its weight. Their weighted sum is maximised. `prompts`: texts, or rows with `prompt` or `messages` and columns
    for the rewards. `held_out`: prompts that choose the best policy; without them the last one is kept. `folder`: where
    metrics and checkpoints go, and what training resumes from; None: a temporary one. `settings`: other sections of a run's
    settings, for example `{"seed": 1, "model": {"lora": {"rank": 16}}, "hardware": {"precision": "bf16"}}`.

    UserError where settings, prompts, rewards or the model cannot be used, or where `folder` holds another training.
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
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._temporary = TemporaryDirectory(prefix="rlhf-ppo-") if folder is None else None  # removed with the trainer
        place = Path(self._temporary.name if self._temporary else folder or "")
        config_of_run = run_config(config or PPOConfig(), settings or {})
        self._open(local_setup(model, rewards, (prompts, held_out), config_of_run, place, keep=folder is not None))

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
        self.estimator = estimator_of(setup.config.ppo)  # once: a user may edit its file while training goes on
        self.timer = PhaseTimer(self.context.device)
        self.machine = step_profiler.all_machines(self.context.device, self.config.hardware.precision)
        models = self.models
        self.source = RolloutSource(self.config, models.sampler, models.tokenizer, setup.prompts, self.timer)
        self.evaluator = Evaluator(self.config, self.context, models, self.rewards)
        self.state = TrainerState(kl_coef=self.config.ppo.kl_coef)
        self.history: list[dict[str, float]] = []  # the metrics of each iteration since the trainer was made
        self._begun, self._in_step = False, False

    def train(self) -> Self:
        """Trains until `iterations` are done, or until held-out reward has not risen for `patience` evaluations.

        The first call resumes from the newest checkpoint of the folder, if there is one. UserError (6) where a check before
        the first step fails, training must stop, or an earlier call was interrupted in the middle of an iteration.
        """
        ppo, state = self.config.ppo, self.state
        self._begin()
        if state.best is None and self.held_out:
            self._evaluate()
        self.timer.restart()
        while state.iteration < ppo.iterations and state.since_best < ppo.patience:
            state.iteration += 1
            self._in_step = True
            metrics = self.step()
            self._in_step = False
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
            stop = stopping.due() if state.iteration < ppo.iterations else 0
            if stop or state.iteration % ppo.checkpoint_every == 0:
                with self.timer("checkpoint"):
                    self._save_checkpoint()
            profile = step_profiler.close(self.timer, metrics, self.machine)
            self.context.tracker.metrics(profile, step=state.iteration)
            self.history.append(metrics | profile)
            if stop:
                raise stopping.stopped(stop, f"after iteration {state.iteration}")
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
            lambda: make_experience(rollout, scores, combined, self.estimator, config.ppo, state.kl_coef)
        )
        with timer("logging"):
            metrics |= reward_metrics([*self.rewards.rewards], scores)
            metrics |= step_profiler.work(
                rollout, models.sampler, models.all_scoring, models.trainable, config, state.iteration
            )
            self._log_samples(rollout, scores)
        with self.source.prefetching(state.iteration + 1) as go_on:
            key = (config.seed, state.iteration)
            kl_loss_coef = self.estimator.kl_loss_coef(state.kl_coef)
            metrics |= update(models.policy, models.critic, experience, config.ppo, key, kl_loss_coef, go_on)
        metrics |= {"ppo/kl_coef": state.kl_coef, "ppo/staleness": float(sample.staleness)}
        metrics["perf/sync_bytes"] = float(sync_bytes)
        if (target := config.ppo.kl_target) is not None:
            batch_size = config.ppo.batch_size
            state.kl_coef = adaptive_kl_coef(
                state.kl_coef, metrics["ppo/kl"], target.target, target.horizon, batch_size
            )
        return metrics

    def save(self, folder: str | Path) -> Path:
        """The policy in an ordinary folder of transformers, its critic in `critic/`: the best one where held-out prompts
        chose it, else that of this moment. All ranks must call it.

        An earlier save in the folder is replaced as a whole. UserError (2) where the folder holds anything else.
        """
        folder = Path(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        mark = {"iteration": self.state.iteration, "best_iteration": self.state.best_iteration}
        collectives.rank_zero_only(lambda: best.make_room(folder, partial), f"making room for {folder}")
        if self.state.best is not None:
            collectives.rank_zero_only(lambda: shutil.copytree(self.best_folder, partial), f"writing {partial}")
        else:
            best.save(partial, self.models)
        collectives.rank_zero_only(lambda: best.put_in_place(partial, folder, mark), f"writing {folder}")
        return folder

    @property
    def best_folder(self) -> Path:
        """The policy with the best held-out reward so far."""
        return checkpoint.best_folder(self.context.checkpoint_folder, self.state.best_iteration)

    def _parts(self) -> dict[str, checkpoint.Part]:
        return {**self.models.engines(), "prefetched": self.source.prefetched}

    def _begin(self) -> None:
        """Before the first iteration of this trainer: resumes, and checks what every metric stands on."""
        if self._in_step:
            raise UserError(
                f"training was interrupted in the middle of iteration {self.state.iteration}: make a new PPOTrainer; with "
                "the same `folder` it goes on from the newest checkpoint",
                6,
            )
        if self._begun:
            return
        self._restore()
        self.context.tracker.tags(preflight_checks.run(self._setup, fresh=self.state.iteration == 0))
        for entry in self.state.alarms:
            self.context.progress.warn(alarms.line(entry))
        self._begun = True

    def _restore(self) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        restored = checkpoint.restore(self.context.checkpoint_folder, self._parts())
        self.context.tracker.rewind(restored["iteration"] if restored else NOTHING)
        for name in (f.name for f in fields(TrainerState) if restored):
            setattr(self.state, name, restored[name])  # type: ignore[index]
        sync_weights(self.models.policy, self.models.sampler)

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
