"""Settings of PPO and similar algorithms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import Code, Count, Fraction, Name, OptimConfig, Positive, Settings

GROUPED = ("grpo", "dr_grpo", "rloo")
"""Estimators that compare responses to one prompt."""


class SamplingConfig(Settings):
    engine: Literal["inprocess", "vllm"] = "inprocess"
    """The sampler of training. `make vllm` installs vLLM, which cannot sample from adapters (model.lora)."""
    temperature: Positive = 1.0  # [O]
    max_new_tokens: Count = 512  # [O]
    batch_size: Count = 64  # rows sampled together on one worker
    tensor_parallel: Count = 1
    """Workers that share one engine of vLLM: each holds a part of every weight, and all their prompts are its."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Engines of vLLM beside the workers, each on a device of its own. 0: every worker samples."""
    one_step_off_policy: bool = False
    """Samples the responses of the next iteration during the update, with the policy before it; importance weights
    correct for the difference."""


class RewardSource(Settings):
    """One reward of PPO: a reward model of this run (`model`) or a Python function (`function`)."""

    model: Name | None = None
    """A name in `reward.models`."""
    function: Code | None = None
    """It is called with `prompts` and `responses` (texts), and with the columns of the rows that its arguments name."""
    weight: float = 1.0
    timeout_s: Positive = 60.0
    """Limit for one call of a function with all responses of a worker; later scores count as failed."""

    @model_validator(mode="after")
    def _one_source(self) -> RewardSource:
        if (self.model is None) == (self.function is None):
            raise ValueError("name either a model or a function")
        return self


class KLTargetConfig(Settings):
    """Adaptive KL coefficient (Ziegler et al. 2019, §2.2)."""

    target: Positive
    horizon: Positive = 10_000.0


class AlarmConfig(Settings):
    """Limits of alarms: a tag, and a warning in the terminal and the report. NaN and infinity always stop the stage."""

    stop: bool = False
    """True: the first alarm stops the stage. Its checkpoints stay, and it resumes when the limit is raised."""
    kl_max: Positive = 50.0
    """Nats per response. Gao et al. 2022 (arXiv 2210.10760, fig. 1): true quality falls while the reward still rises
    [O]."""
    eos_rate_min: Fraction = 0.02
    """Fraction of responses that end with EOS. With fewer, the reward mostly scores truncated text [O]."""
    entropy_ratio_min: Fraction = 0.1
    """Fraction of the first iteration's entropy. A policy with little entropy does not explore [O]."""
    rollout_logprob_diff_max: Positive = 1.0
    """Largest difference at one token between sampler and trainer in nats; well above log 2, where tis_cap begins to
    cap [O]. With `ppo.sampling.one_step_off_policy` every token differs by an update, so the limit applies to the
    mean."""
    reward_failed_fraction_max: Fraction = 0.1
    """Fraction of failed scores. Failures may have something in common, so the rest may be biased [O]."""


class PPOConfig(Settings):
    helpfulness_model: str = "helpfulness"
    safety_model: str = "safety"
    """Names in `reward.models`; the same name twice uses one reward model in both roles."""
    rewards: dict[Name, RewardSource] = {}
    """Rewards whose weighted sum is maximised, in place of Llama 2's rule over the two models above."""
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"] | Code = "gae"
    """An estimator of `rlhf.algorithms.advantages`, or `module:name` of your own; only gae trains a critic."""
    iterations: Count = 200  # [P] 200–400
    batch_size: Count = 512  # responses per iteration over all workers [P]
    group_size: Count = 1  # [O]
    """Responses per prompt. They stay on one worker and in one minibatch, so that the prompt is read once."""
    minibatch_size: Count = 64  # [P]
    epochs: Count = 1  # [P]
    micro_batch_size: Count = 4  # maximum rows of a micro-batch
    micro_batch_tokens: Count | None = None
    """Limits a micro-batch by tokens, padding included, instead of `micro_batch_size`; a longer row is read alone."""
    packing: bool = False
    """Models read the rows of a micro-batch concatenated, without padding; rows do not see each other."""
    max_prompt_length: Count = 2048
    sampling: SamplingConfig = SamplingConfig()
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.01  # [P] 7B/13B .01, 34B/70B .005
    kl_target: KLTargetConfig | None = None
    gamma: Fraction = 1.0  # [O]
    gae_lambda: Fraction = 0.95  # [O]
    clip_range: Positive = 0.2  # [P]
    value_clip_range: Positive = 0.2  # [O]
    tis_cap: Annotated[float, Field(ge=1.0)] = 2.0
    safety_threshold: Fraction = 0.15  # [P] on the sigmoid scale
    whiten_rewards: bool | None = None  # [P] for gae
    """None: as the estimator is published; gae divides the scores by their deviation, the others do not."""
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] | None = None
    """Subtracted from the score of a response that did not end itself, after whitening."""
    optim: OptimConfig = OptimConfig(lr=1e-6)  # [P]
    critic_optim: OptimConfig = OptimConfig(lr=5e-6)  # [O]
    eval_every: Count = 10  # iterations
    eval_prompts: Count = 128
    patience: Count = 5
    """Evaluations without a better held-out reward before the stage stops early."""
    checkpoint_every: Count = 20  # iterations
    logged_samples: Count = 8
    alarms: AlarmConfig = AlarmConfig()

    @property
    def names_code(self) -> bool:
        """Whether the settings name code of the user."""
        return ":" in self.advantage or any(source.function for source in self.rewards.values())

    @property
    def reward_models(self) -> dict[str, str]:
        """Setting → the name of the reward model."""
        if self.rewards:
            return {f"rewards.{key}.model": source.model for key, source in self.rewards.items() if source.model}
        return {"helpfulness_model": self.helpfulness_model, "safety_model": self.safety_model}
