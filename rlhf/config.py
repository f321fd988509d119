"""Every setting of a run, one model per concern. An unknown key is an error; nothing here imports torch.

Marks: [P] published for Llama 2-Chat (arXiv 2307.09288), [O] our choice where nothing was published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Also a folder's name and a part of dotted names."""

Tag = Literal["helpful", "safety"]


def _absolute_file(code: str) -> str:
    """`my/file.py:name` with the whole path: workers have other working directories."""
    file, _, name = code.rpartition(":")
    return f"{Path(file).expanduser().absolute()}:{name}" if file.endswith(".py") else code


Code = Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$"), AfterValidator(_absolute_file)]
"""`module:name`, or `path/to/file.py:name`."""
ESTIMATORS = ("gae", "grpo", "dr_grpo", "rloo", "reinforce++")
"""Of `rlhf.algorithms.advantages.ADVANTAGES`, which needs torch."""
GROUPED = ("grpo", "dr_grpo", "rloo")

CREDENTIALS = re.compile(r"(?<=://)[^/?#\s'\"]*@")
SECRET_KEY = re.compile(r"([?&][\w.-]*(?:password|passwd|pwd|token|secret|key)=)[^&#\s'\"]*", re.IGNORECASE)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class LoraConfig(Settings):
    rank: Count = 16
    alpha: Count = 32
    targets: str | list[str] = "all-linear"


class TinyConfig(Settings):
    """Shape of the Llama that `model.path: tiny` makes on the spot, and of its tokenizer."""

    vocab_size: Count = 768
    hidden_size: Count = 128
    intermediate_size: Count = 352
    layers: Count = 4
    heads: Count = 4


class ModelConfig(Settings):
    path: str = "tiny"
    """A folder, a hub name, or `tiny`: made from `model.tiny` with a tokenizer trained on the run's demonstrations."""
    chat_format: Literal["auto", "llama2", "tokenizer"] = "auto"
    """How dialogues become tokens: `tokenizer` by the tokenizer's own chat template, `auto` by that where there is one,
    else as Llama 2-Chat does. Artifacts keep theirs."""
    tiny: TinyConfig = TinyConfig()
    lora: LoraConfig | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False


class HardwareConfig(Settings):
    workers: Count = 1
    workers_per_reward_model: Count | None = None
    """None: as many as `workers`. Fewer leave room for reward models side by side."""
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    zero_stage: Literal[0, 1, 2, 3] = 3
    offload_to_cpu: bool = False
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: float32 master weights, bfloat16 autocast in forward and backward; heads and losses stay float32."""
    ray_address: str | None = None
    """None: a private Ray on this machine. `auto` or `ray://…`: the cluster that is already there."""
    placement_timeout_s: Positive = 600.0
    collective_timeout_s: Positive = 600.0
    max_restarts: Annotated[int, Field(ge=0)] = 1


class OptimConfig(Settings):
    lr: Annotated[float, Field(ge=0.0)]
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-5
    max_grad_norm: Positive = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: Fraction = 0.1
    """The cosine ends at this share of `lr`."""
    warmup_ratio: Fraction = 0.0
    min_warmup_steps: Annotated[int, Field(ge=0)] = 0


class SourceConfig(Settings):
    """Rows of one file, folder or hub data set; `path: shipped` is the data that the project ships."""

    path: str
    format: Literal[
        "auto",
        "native",
        "hh",
        "pairs",
        "ultrafeedback",
        "helpsteer",
        "oasst",
        "pandalm",
        "compared",
        "ranked",
        "alpaca",
        "sharegpt",
        "messages",
        "answers",
        "prompts",
    ] = "auto"
    tag: Tag | None = None
    """Tag for rows that bring none of their own (None: helpful)."""
    split: str | None = None
    """`train` or `held_out` of shipped data; a split of a hub data set or of the files in a folder."""
    config: str | None = None
    """A subset of a hub data set, or a folder in it."""
    columns: dict[str, str] = {}
    """Which column holds what: {prompt: question, chosen: good, rejected: bad}. Empty: the row's own names."""
    select_file: str | None = None
    """JSON file with lists of row numbers; only those under `select_key` are read."""
    select_key: str | None = None
    limit: Count | None = None


class RoleConfig(Settings):
    train: list[SourceConfig]
    held_out: list[SourceConfig] = []
    """Empty: `data.held_out_fraction` of the training prompts is set aside, by a hash of the prompt."""


class DataConfig(Settings):
    root: Folder = Path()
    """Relative source paths start here."""
    demonstrations: RoleConfig
    preferences: RoleConfig | None = None
    prompts: RoleConfig | None = None
    """None where no stage of the pipeline reads it."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    shared_prompts: Literal["refuse", "drop"] = "refuse"
    """What happens to training rows whose prompt is also held out, for whatever role."""
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1
    gold: Literal["none", "shipped"] = "none"
    """`shipped`: answers are also given their true quality; only the shipped world has one."""


class SFTConfig(Settings):
    epochs: Positive = 2.0  # [P]
    batch_size: Count = 64  # sequences per optimizer step over all workers [P]
    micro_batch_size: Count = 8  # rows at once on a worker, at most
    max_length: Count = 4096  # [P]
    packing: bool = True  # [P]
    optim: OptimConfig = OptimConfig(lr=2e-5, eps=1e-8, schedule="cosine", warmup_ratio=0.03)
    evals: Count = 4  # held-out loss so many times in the stage
    checkpoints: Annotated[int, Field(ge=0)] = 2


class RewardModelConfig(Settings):
    own_tag: Tag
    other_fraction: Fraction = 0.0
    """Share of the training set that comes from the other tag (helpfulness 0.5, safety 0.1) [P]."""
    safety_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """λ of the auxiliary safe/unsafe loss [O]."""


class RewardConfig(Settings):
    models: dict[Name, RewardModelConfig] = {
        "helpfulness": RewardModelConfig(own_tag="helpful", other_fraction=0.5),
        "safety": RewardModelConfig(own_tag="safety", other_fraction=0.1, safety_loss_weight=0.5),
    }
    margin: Literal["none", "small", "large"] = "small"  # [P]: all three were compared
    epochs: Positive = 1.0  # [P]
    batch_size: Count = 512  # pairs per optimizer step over all workers [P]
    micro_batch_size: Count = 8  # rows at once on a worker, at most
    max_length: Count = 4096
    optim: OptimConfig = OptimConfig(lr=1e-5, schedule="cosine", warmup_ratio=0.03, min_warmup_steps=5)  # [P]
    evals: Count = 4
    checkpoints: Annotated[int, Field(ge=0)] = 2
    center_rows: Count = 256
    """SFT answers over which the mean reward is taken and subtracted; drawn by hash, of every tag and source."""


class SamplingConfig(Settings):
    engine: Literal["inprocess", "vllm"] = "inprocess"
    """What samples answers in training. vllm: `make vllm` installs it; adapters (model.lora) it does not sample from."""
    temperature: Positive = 1.0  # [O]
    max_new_tokens: Count = 512  # [O]
    batch_size: Count = 64  # rows sampled together on one worker
    one_step_off_policy: bool = False
    """Samples the answers of the next iteration during the update, so by a policy that is one update older; the
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
    """Nats per answer. Gao et al. 2022 (arXiv 2210.10760, fig. 1): true quality falls while the reward still rises [O]."""
    eos_rate_min: Fraction = 0.02
    """Answers that end themselves. With fewer, the reward is mostly that of text that was cut off [O]."""
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
    batch_size: Count = 512  # answers per iteration over all workers [P]
    group_size: Count = 1  # [O]
    """All answers of a prompt stay on one worker and in one minibatch, so that they can share the work on it."""
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
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] = 1.0
    """Subtracted from the score of an answer that did not end itself, after whitening."""
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


class TrackingConfig(Settings):
    uri: str | None = "sqlite:///mlflow.db"
    """Any MLflow tracking URI; null keeps the run's own JSONL files alone."""
    experiment: str = "rlhf"


class RunConfig(Settings):
    name: Name
    pipeline: Annotated[list[str], Field(min_length=1)] = ["sft", "reward", "ppo"]
    """Stages in their order; `stages/base.py` lists those that there are."""
    seed: int = 0
    runs_dir: Folder = Path("runs")
    model: ModelConfig = ModelConfig()
    hardware: HardwareConfig = HardwareConfig()
    data: DataConfig
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @property
    def reward_workers(self) -> int:
        return self.hardware.workers_per_reward_model or self.hardware.workers

    @model_validator(mode="after")
    def _settings_fit_together(self, info: ValidationInfo) -> RunConfig:
        """All misfits in one error, a line each that begins with the dotted name of the setting to change.

        The caller may find more: those of the pipeline, whose stages are not known here (`context["misfits"]`).
        """
        misfits = [*self._uneven_batches(), *(info.context["misfits"](self) if info.context else ())]
        if "ppo" in self.pipeline:
            misfits += [*self._unknown_reward_models(), *self._uneven_minibatches()]
            misfits += [*self._unshared_prompts(), *self._adapters_for_vllm()]
        if misfits:
            raise ValueError("\n".join(misfits))
        return self

    def _unknown_reward_models(self) -> Iterator[str]:
        for key, name in self.ppo.reward_models.items():
            if name not in self.reward.models:
                yield f"ppo.{key} is {name!r}, but reward.models has {', '.join(self.reward.models)}"
        if self.ppo.rewards and not any(source.weight for source in self.ppo.rewards.values()):
            yield "ppo.rewards gives every reward the weight 0, so there is nothing to maximise"

    def _adapters_for_vllm(self) -> Iterator[str]:
        if self.ppo.sampling.engine == "vllm" and self.model.lora is not None:
            yield "ppo.sampling.engine is vllm, which samples from whole weights alone, but model.lora is set; use inprocess"

    def _uneven_batches(self) -> Iterator[str]:
        """Under ZeRO-3 every rank must make the same number of forward passes, or all of them wait for ever."""
        own = self.hardware.workers_per_reward_model is not None
        for stage, (total, workers) in self._batches().items():
            name = "ppo.minibatch_size" if stage == "ppo" else f"{stage}.batch_size"
            key = "hardware.workers_per_reward_model" if stage == "reward" and own else "hardware.workers"
            if total % workers:
                yield f"{name} is {total}, which is not a multiple of {workers} workers ({key})"

    def _batches(self) -> dict[str, tuple[int, int]]:
        """Rows of an optimizer step of each stage of the pipeline, and the workers that share them."""
        workers = self.hardware.workers
        batches = {
            "sft": (self.sft.batch_size, workers),
            "reward": (self.reward.batch_size, self.reward_workers),
            "ppo": (self.ppo.minibatch_size, workers),
        }
        return {stage: batch for stage, batch in batches.items() if stage in self.pipeline}

    def _uneven_minibatches(self) -> Iterator[str]:
        share, left = divmod(self.ppo.minibatch_size, self.hardware.workers)
        if left == 0 and share % self.ppo.group_size:
            yield (
                f"ppo.group_size is {self.ppo.group_size}, which does not divide the {share} rows that a "
                "worker has of a minibatch (ppo.minibatch_size, hardware.workers)"
            )
        if self.ppo.group_size < 2 and self.ppo.advantage in GROUPED:
            yield (
                f"ppo.group_size is {self.ppo.group_size}, but {self.ppo.advantage} (ppo.advantage) compares responses to "
                "one prompt; it needs at least 2, and 4 to 16 are usual"
            )
        if self.ppo.batch_size % self.ppo.minibatch_size:
            yield f"ppo.batch_size is {self.ppo.batch_size}, not a multiple of minibatch_size {self.ppo.minibatch_size}"

    def _unshared_prompts(self) -> Iterator[str]:
        ppo, attention = self.ppo, self.model.attention
        if ppo.packing and ppo.group_size > 1 and attention == "flash_attention_2":
            yield (
                f"model.attention is {attention}, which takes no mask by which packed answers could share their prompt "
                "(ppo.packing, ppo.group_size); use sdpa"
            )

    def with_fitting_micro_batches(self) -> RunConfig:
        """Each stage's micro_batch_size lowered to the nearest that divides a worker's share of the batch."""

        def fit(stage: SFTConfig | RewardConfig | PPOConfig, share: int) -> Settings:
            sizes = range(min(stage.micro_batch_size, share), 0, -1)
            return stage.model_copy(update={"micro_batch_size": next(size for size in sizes if share % size == 0)})

        shares = {stage: total // workers for stage, (total, workers) in self._batches().items()}
        return self.model_copy(update={stage: fit(getattr(self, stage), share) for stage, share in shares.items()})


def without_secrets(value: Any) -> Any:
    """`value` as it may be shown and stored: texts in it lose what stands before the host of an address, a user's name
    and password, and the values of keys like `token` behind a `?`."""
    if isinstance(value, str):
        return SECRET_KEY.sub(r"\1***", CREDENTIALS.sub("", value))
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def public(config: RunConfig) -> dict[str, Any]:
    """All settings, as they may be shown and stored."""
    return without_secrets(config.model_dump(mode="json"))
