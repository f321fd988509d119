"""Stage 3, PPO: sample, score, update; answer held-out prompts every few iterations and keep the best policy.

Llama 2, §3.2.3; what was not published is marked in rlhf/config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.algorithms.kl import adaptive_kl_coef
from rlhf.algorithms.rewards import piecewise_reward
from rlhf.config import PPOConfig, RunConfig
from rlhf.data import next_prompts, short_prompts, split_held_out
from rlhf.data.batches import PromptBatch, Rollout, Scores, select, to
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, full_parameters, open_engine, sharded_loading
from rlhf.errors import UserError
from rlhf.evaluation.policy_report import Answers, policy_report
from rlhf.generation import InProcessSampler, Sampler, open_sampler
from rlhf.models import (
    ScalarModel,
    add_lora,
    check_model,
    check_packing,
    load_causal,
    load_scalar,
    load_tokenizer,
    new_critic,
    recompute_activations,
)
from rlhf.models.policy import PolicyModel
from rlhf.ppo import alarms, preflight_checks, step_profiler
from rlhf.ppo.experience import make_experience
from rlhf.ppo.held_out import answer_held_out
from rlhf.ppo.rollout_source import Ahead, answer_and_read, learn_and_sample
from rlhf.ppo.samples import sampled
from rlhf.ppo.scoring import score_rollout
from rlhf.ppo.step_profiler import PhaseTimer
from rlhf.ppo.update import update
from rlhf.profiling.memory import keep_freed_memory
from rlhf.runs import checkpoint, provenance
from rlhf.runs.artifacts import Artifact
from rlhf.runs.context import StageContext
from rlhf.tracking import NOTHING
from stages import best


@dataclass(frozen=True)
class Models:
    policy: Engine
    reference: Engine
    critic: Engine
    rewards: dict[str, Engine]
    sampler: Sampler
    tokenizer: Any
    ahead: Ahead = field(default_factory=Ahead)


def main(config: RunConfig, context: StageContext) -> Artifact:
    """Trains the policy and returns the artifact of the iteration with the best held-out reward."""
    ppo = config.ppo
    data = provenance.stage_data(config, context.roles)
    machine = step_profiler.all_machines(context.device, config.hardware.precision)
    models = open_models(config, context)
    prompts, held_out = (
        short_prompts(models.tokenizer, rows_, ppo.max_prompt_length)
        for rows_ in (data["prompts"].train, data["prompts"].held_out)
    )
    for_choice, for_report = split_held_out(held_out, ppo.eval_prompts, config.seed)
    judge = Judge(config, context, models)
    restored = checkpoint.restore(context.checkpoint_folder, _parts(models))
    context.tracker.rewind(restored["iteration"] if restored else NOTHING)
    state = restored or {
        "iteration": 0,
        "beta": ppo.kl_coef,
        "best": None,
        "best_iteration": 0,
        "since_best": 0,
        "first_entropy": None,
        "alarms": [],
    }
    _sync(models)
    verify(config, context, models, prompts, fresh=state["iteration"] == 0)
    for entry in state["alarms"]:
        context.progress.warn(alarms.line(entry))
    if state["best"] is None:
        state["best"] = judge.reward(for_choice, 0)
        best.keep(context, models, 0)

    timer = PhaseTimer(context.device)
    while state["iteration"] < ppo.iterations and state["since_best"] < ppo.patience:
        state["iteration"] += 1
        metrics = iterate(config, context, models, prompts, state, timer)
        with timer("logging"):
            context.tracker.metrics(metrics, step=state["iteration"])
            watch(config, context, metrics, state)
        if state["iteration"] % ppo.eval_every == 0 or state["iteration"] == ppo.iterations:
            with timer("evaluation"):
                _sync(models)
                reward = judge.reward(for_choice, state["iteration"])
                state["since_best"] += 1
                if reward > state["best"]:
                    state |= {"best": reward, "best_iteration": state["iteration"], "since_best": 0}
                    best.keep(context, models, state["iteration"])
        with timer("logging"):
            shown = {"reward": metrics["ppo/reward"], "kl": metrics["ppo/kl"]}
            context.progress.update(state["iteration"], ppo.iterations, **shown)
        if state["iteration"] % ppo.checkpoint_every == 0:
            with timer("checkpoint"):
                checkpoint.save(context.checkpoint_folder, state["iteration"], _parts(models), state)
        context.tracker.metrics(step_profiler.close(timer, metrics, machine), step=state["iteration"])
    return best.finish(config, context, models, judge, for_report, state, provenance.parents(data, context.inputs))


def iterate(
    config: RunConfig,
    context: StageContext,
    models: Models,
    prompts: Sequence[Any],
    state: dict[str, Any],
    timer: PhaseTimer,
) -> dict[str, float]:
    """One iteration: sample → score → experience → update."""
    ppo, iteration, rank, world = config.ppo, state["iteration"], context.rank, context.world_size
    share = collectives.shard(ppo.batch_size, rank, world)
    draw = partial(next_prompts, models.tokenizer, prompts, config)

    def sample(batch: PromptBatch, iteration: int, on_rows: Any = None) -> Rollout:
        mine = to(select(batch, share), context.device)
        return models.sampler.sample(mine, ppo.sampling, config.seed, iteration, on_rows)

    with timer("sync"):
        bytes_moved = _sync(models)
    with timer("sampling"):
        batch = draw(iteration)
    lag = float(models.ahead.rollout is not None)
    read, size = partial(_read, models=models, config=config), share.stop - share.start
    rollout, scores, chunks = answer_and_read(
        partial(sample, batch, iteration), read, models.ahead, models.sampler, size, ppo.scoring_chunks, timer
    )
    with timer("scoring"):
        rollout, scores = collectives.gather_rows(to(rollout, torch.device("cpu"))), collectives.gather_rows(scores)
    # Of one rank, with its branches on floats and the KL that moves β.
    experience, metrics = collectives.broadcast_result(
        lambda: make_experience(rollout, scores, batch.is_safety_B, ppo, state["beta"])
    )
    with timer("logging"):
        metrics |= _work(rollout, chunks, models, config, iteration, world)
        if context.is_writer and (iteration - 1) % ppo.eval_every == 0:
            table = sampled(models.tokenizer, rollout, scores, ppo.logged_samples, iteration)
            context.tracker.table("samples", table)
    learn = partial(update, models.policy, models.critic, experience, ppo, config.seed, iteration, rank, world)
    if ppo.sampling.ahead and iteration < ppo.iterations:
        then = lambda on_rows: sample(draw(iteration + 1), iteration + 1, on_rows)
        metrics |= learn_and_sample(learn, then, models.ahead, models.sampler, timer)
    else:
        with timer("update"):
            metrics |= learn()
    metrics |= {"ppo/kl_coef": state["beta"], "ppo/staleness": lag, "perf/sync_bytes": float(bytes_moved)}
    if ppo.kl_target is not None:
        state["beta"] = adaptive_kl_coef(
            state["beta"], metrics["ppo/kl"], ppo.kl_target.target, ppo.kl_target.horizon, ppo.batch_size
        )
    return metrics


def verify(config: RunConfig, context: StageContext, models: Models, prompts: Sequence[Any], fresh: bool) -> None:
    """Checks before the first step what every figure stands on, on a small rollout. UserError (6) where one fails.

    `fresh`: no step was made, so the policy must still be the reference.
    """
    ppo, precision = config.ppo, config.hardware.precision
    _check_room(models.sampler, ppo)
    batch = next_prompts(models.tokenizer, prompts, config, 1)
    mine = select(batch, collectives.shard(ppo.batch_size, context.rank, context.world_size))
    few = select(mine, slice(preflight_checks.ROWS))
    short = ppo.sampling.model_copy(
        update={"max_new_tokens": min(preflight_checks.NEW_TOKENS, ppo.sampling.max_new_tokens)}
    )
    rollout = models.sampler.sample(to(few, context.device), short, config.seed, 0)
    scores = _read(rollout, models, config)
    findings = [
        preflight_checks.first_ratio(models.policy, rollout, scores, ppo, precision),
        preflight_checks.broken_ends(rollout, models.sampler.stop_ids, models.tokenizer.pad_token_id),
        _sampler_check(models, rollout, scores, precision),
    ]
    if fresh:
        findings.append(preflight_checks.same_as_reference(scores, rollout, precision))
    for name, engine in models.rewards.items():
        folder = context.inputs[f"reward/{name}"].path
        findings.append(preflight_checks.fixed_score(name, engine, folder, models.tokenizer, precision))
    context.tracker.tags(preflight_checks.agree(findings))


def _check_room(sampler: Sampler, ppo: PPOConfig) -> None:
    """UserError (5), on every rank, where one of them has no memory to sample the longest row that may come."""
    refusal = None
    if isinstance(sampler, InProcessSampler):
        try:
            sampler.rows_at_once(ppo.max_prompt_length, ppo.sampling)
        except UserError as error:
            refusal = error
    if refused := [error for error in collectives.gather_objects(refusal) if error is not None]:
        raise refused[0]


def _sampler_check(models: Models, rollout: Rollout, scores: Scores, precision: str) -> preflight_checks.Finding:
    """Weights can be compared where the sampler keeps them as they are; vLLM lays them out anew."""
    if isinstance(models.sampler, InProcessSampler):
        return preflight_checks.synced(models.policy, models.sampler.model)
    return preflight_checks.sampler_agrees(rollout, scores, precision)


def watch(config: RunConfig, context: StageContext, metrics: dict[str, float], state: dict[str, Any]) -> None:
    """Alarms of the iteration: each becomes a tag and a warning once. UserError (6) where training must stop."""
    limits, iteration = config.ppo.alarms, state["iteration"]
    metrics = collectives.broadcast_result(lambda: metrics)  # times differ
    alarms.refuse_not_finite(metrics, iteration)
    if state["first_entropy"] is None:
        state["first_entropy"] = metrics["ppo/entropy"]
    known = {entry["name"] for entry in state["alarms"]}
    state["alarms"] = alarms.noted(state["alarms"], alarms.sounding(metrics, state["first_entropy"], limits), iteration)
    new = [entry for entry in state["alarms"] if entry["name"] not in known]
    for entry in new:
        context.tracker.tags({f"alarm.{entry['name']}": alarms.line(entry)})
        context.progress.warn(alarms.line(entry))
    if new and limits.stop:
        text = "\n".join(alarms.line(entry) for entry in new)
        raise UserError(f"stopped by an alarm (ppo.alarms.stop): {text}", 6)


def open_models(config: RunConfig, context: StageContext) -> Models:
    """Policy and critic learn; reference and reward models are frozen; all are sharded, the sampler holds a full copy."""
    if context.device.type == "cpu":
        keep_freed_memory()
    ppo, hardware = config.ppo, config.hardware
    sft = context.inputs["sft"].path
    steps = ppo.iterations * ppo.epochs * (ppo.batch_size // ppo.minibatch_size)
    names = dict.fromkeys([ppo.helpfulness_model, ppo.safety_model])
    reward_paths = {name: context.inputs[f"reward/{name}"].path for name in names}

    def engine(module: torch.nn.Module, optim: Any = None) -> Engine:
        if optim is not None and config.model.gradient_checkpointing:
            recompute_activations(module)
        return open_engine(module.to(context.device), optim, steps, hardware, context.local)

    def causal() -> torch.nn.Module:
        return load_causal(sft, attention=config.model.attention)

    def scalar(name: str) -> ScalarModel:
        model = load_scalar(reward_paths[name], attention=config.model.attention)
        model.packing = ppo.packing
        return model

    with sharded_loading(hardware, context.local):
        policy, reference, critic = causal(), causal(), new_critic(scalar(ppo.helpfulness_model))
        rewards = {name: scalar(name) for name in reward_paths}
    check_model(config, cast(Any, policy).config)
    if config.model.lora is not None:
        torch.manual_seed(config.seed)
        policy = add_lora(policy, config.model.lora, "causal", config.seed)
        critic = add_lora(critic, config.model.lora, "scalar", config.seed)
    tokenizer = load_tokenizer(sft)
    sampler = open_sampler(config, sft, tokenizer, context.device)
    if ppo.packing:
        whole = sampler.model if isinstance(sampler, InProcessSampler) else causal()  # one that is not sharded
        check_packing(whole, "ppo.packing", ppo.group_size > 1)
    return Models(
        policy=engine(PolicyModel(policy, ppo.packing), ppo.optim),
        reference=engine(PolicyModel(reference, ppo.packing)),
        critic=engine(critic, ppo.critic_optim),
        rewards={name: engine(module) for name, module in rewards.items()},
        sampler=sampler,
        tokenizer=tokenizer,
    )


class Judge:
    """Held-out evaluation of whatever the sampler holds."""

    def __init__(self, config: RunConfig, context: StageContext, models: Models) -> None:
        self.config, self.context, self.models = config, context, models

    def answers(self, prompts: Sequence[Any], sampler: Sampler | None = None) -> Answers:
        models = self.models
        return answer_held_out(
            self.config,
            sampler or models.sampler,
            models.tokenizer,
            prompts,
            models.rewards,
            models.reference,
            self.context.device,
            _gold_scorer(self.config),
        )

    def reward(self, prompts: Sequence[Any], iteration: int) -> float:
        """Mean over prompts of the reward that PPO maximises; all figures go to the tracker under eval/."""
        answers = self.answers(prompts)
        report = policy_report(answers, prompts)
        metrics = {f"eval/{name.replace('.', '_')}": estimate.value for name, estimate in report.items()}
        score_B = piecewise_reward(
            torch.tensor(answers.scores[f"reward.{self.config.ppo.helpfulness_model}"]),
            torch.tensor(answers.scores[f"reward.{self.config.ppo.safety_model}"]),
            torch.tensor([prompt.tag == "safety" for prompt in prompts]),
            torch.tensor(answers.flagged),
        )
        metrics["eval/reward"] = float(score_B.mean())
        self.context.tracker.metrics(metrics, step=iteration)
        return collectives.broadcast_result(
            lambda: metrics["eval/reward"]
        )  # it chooses the best policy, and when to stop


def _read(rollout: Rollout, models: Models, config: RunConfig) -> Scores:
    """What the models say of this rank's rows."""
    ppo = config.ppo
    helpful, safety = models.rewards[ppo.helpfulness_model], models.rewards[ppo.safety_model]
    return score_rollout(rollout, models.policy, models.reference, models.critic, helpful, safety, ppo)


def _work(
    rollout: Rollout, chunks: list[Tensor], models: Models, config: RunConfig, iteration: int, world: int
) -> dict[str, float]:
    """What the iteration asks of the models."""
    learners = [models.policy.module, models.critic.module]
    readers = [*learners, models.reference.module, *(engine.module for engine in models.rewards.values())]
    return step_profiler.work(rollout, chunks, models.sampler, readers, learners, config, iteration, world)


def _sync(models: Models) -> int:
    """The sampler's copy becomes the policy of this moment; returns the bytes moved."""
    changed = full_parameters(models.policy.module, trainable_only=True)
    return models.sampler.load_weights((name.removeprefix("causal."), tensor) for name, tensor in changed)


def _parts(models: Models) -> dict[str, checkpoint.Part]:
    """What a checkpoint keeps beside the state."""
    return {"policy": models.policy, "critic": models.critic, "ahead": models.ahead}


def _gold_scorer(config: RunConfig) -> Callable[[str, str], float] | None:
    if config.data.gold == "none":
        return None
    from reward_data.gold import gold_score

    return gold_score
