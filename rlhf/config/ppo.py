"""Settings of PPO and its kin."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import Code, Count, Fraction, Name, OptimConfig, Positive, Settings

GROUPED = ("grpo", "dr_grpo", "rloo")
"""Estimators that compare responses to one prompt."""


class SamplingConfig(Settings):
    engine: Literal["inprocess", "vllm"] = "inprocess"
    """What samples responses in training. vllm: `make vllm` installs it; adapters (model.lora) it does not sample from."""
    temperature: Positive = 1.0  # [O]
    max_new_tokens: Count = 512  # [O]
    batch_size: Count = 64  # rows sampled together on one worker
    one_step_off_policy: bool = False
    """Samples the responses of the next iteration during the update, so by a policy that is one update older; the
    importance weight makes up for that."""


class RewardSource(Settings):
    """One reward of PPO: a reward model of this run (`model`) or a Python function (`function`)."""

    model: Name | None = None
    """A name in `reward.models`."""
    function: Code | None = None
    """It is called with `prompts` and `responses` (texts), and with the columns of the rows that it names."""
    weight: float = 1.0
    timeout_s: Positive = 60.0
    """For one call of a function with all responses of a worker; scores that come later have failed."""

    @model_validator(mode="after")
    def _one_source(self) -> RewardSource:
        if (self.model is None) == (self.function is None):
            raise ValueError("name either a model or a function")
        return self


class KLTargetConfig(Settings):
    """Adaptive beta (Ziegler et al. 2019, §2.2)."""

    target: Positive
    horizon: Positive = 10_000.0


class AlarmConfig(Settings):
    """Signs of a run that goes wrong: a tag, a warning in the terminal and in the report. NaN and Inf always stop it."""

    stop: bool = False
    """True: the first alarm stops the stage; its checkpoints stay, and it goes on when the limit is raised."""
    kl_max: Positive = 50.0
    """Nats per response. Gao et al. 2022 (arXiv 2210.10760, fig. 1): true quality falls while the reward still rises [O]."""
    eos_rate_min: Fraction = 0.02
    """Responses that end themselves. With fewer, the reward is mostly that of text that was cut off [O]."""
    entropy_ratio_min: Fraction = 0.1
    """Of the first iteration's entropy. A policy that hardly chooses explores nothing [O]."""
    rollout_logprob_diff_max: Positive = 1.0
    """Nats at one token between sampler and trainer: well past log 2, where tis_cap begins to cut [O]. With
    `ppo.sampling.one_step_off_policy` they differ by an update at every token, so there it is the mean that must not reach it."""
    reward_failed_fraction_max: Fraction = 0.1
    """Scores that a reward could not give. Those that fail may be of a kind, so what is left is biased [O]."""


class PPOConfig(Settings):
    helpfulness_model: str = "helpfulness"
    safety_model: str = "safety"
    """Names in `reward.models`; the same name twice uses one reward model alone."""
    rewards: dict[Name, RewardSource] = {}
    """Rewards whose weighted sum is maximised, in place of Llama 2's rule over the two models above."""
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"] | Code = "gae"
    """An estimator of `rlhf.algorithms.advantages`, or `module:name` of one's own; gae alone trains a critic."""
    iterations: Count = 200  # [P] 200–400
    batch_size: Count = 512  # responses per iteration over all workers [P]
    group_size: Count = 1  # [O]
    """All responses of a prompt stay on one worker and in one minibatch, so that they can share the work on it."""
    minibatch_size: Count = 64  # [P]
    epochs: Count = 1  # [P]
    micro_batch_size: Count = 4  # rows at once on a worker, at most
    micro_batch_tokens: Count | None = None
    """Tokens at once on a worker, padding inside, in place of `micro_batch_size`; a longer row goes alone."""
    packing: bool = False
    """Models read the rows of a forward pass one behind the other, without padding; none sees another."""
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
        """Whether the user's own code takes part."""
        return ":" in self.advantage or any(source.function for source in self.rewards.values())

    @property
    def reward_models(self) -> dict[str, str]:
        """Setting → the reward model of the run that it names."""
        if self.rewards:
            return {f"rewards.{key}.model": source.model for key, source in self.rewards.items() if source.model}
        return {"helpfulness_model": self.helpfulness_model, "safety_model": self.safety_model}
