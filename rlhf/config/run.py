"""Settings of a whole run, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from rlhf.config.base import Count, Folder, Name, Positive, Settings
from rlhf.config.data import DataConfig
from rlhf.config.ppo import GROUPED, PPOConfig
from rlhf.config.secrets import without_secrets
from rlhf.config.supervised import DPOConfig, RewardConfig, SFTConfig, SupervisedConfig


class LoraConfig(Settings):
    rank: Count = 16
    alpha: Count = 32
    targets: str | list[str] = "all-linear"


class TinyConfig(Settings):
    """Shape of the new Llama of `model.path: tiny`, and of its tokenizer."""

    vocab_size: Count = 768
    hidden_size: Count = 128
    intermediate_size: Count = 352
    layers: Count = 4
    heads: Count = 4


class ModelConfig(Settings):
    path: str = "tiny"
    """A folder, a hub name, or `tiny`: a new model with a tokenizer trained on the run's demonstrations."""
    chat_format: Literal["auto", "llama2", "tokenizer"] = "auto"
    """How dialogues become tokens: `tokenizer` uses the tokenizer's own chat template, `llama2` the format of Llama
    2-Chat, `auto` the template if there is one, else llama2. Artifacts keep their format."""
    tiny: TinyConfig = TinyConfig()
    lora: LoraConfig | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False


class HardwareConfig(Settings):
    workers: Count = 1
    min_workers: Count | None = None
    """Where a cluster loses nodes for longer than `placement_timeout_s`, stages go on with as few workers as this. None:
    with no fewer than `workers`."""
    workers_per_reward_model: Count | None = None
    """None: as many as `workers`. With fewer, reward models can run side by side."""
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """A worker is one process, which computes on one GPU or on CPUs."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    offload_to_cpu: bool = False
    sequence_parallel: Count = 1
    """Workers after one another that read the same rows, each a slice of every sequence, in SFT, reward training and PPO:
    activations are divided by it. For sequences too long for one worker."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: float32 master weights, bfloat16 autocast in forward and backward; heads and losses stay float32."""
    ray_address: str | None = None
    """None: a private Ray on this machine. `auto` or `ray://…`: an existing cluster."""
    placement_timeout_s: Positive = 600.0
    collective_timeout_s: Positive = 600.0
    max_restarts: Annotated[int, Field(ge=0)] = 1


class TrackingConfig(Settings):
    uri: str | None = "sqlite:///mlflow.db"
    """Any MLflow tracking URI; null writes only the JSONL files of the run."""
    experiment: str = "rlhf"


class RunConfig(Settings):
    name: Name
    pipeline: Annotated[list[str], Field(min_length=1)] = ["sft", "reward", "ppo"]
    """Stages in order; `stages/base.py` has the list."""
    seed: int = 0
    runs_dir: Folder = Path("runs")
    model: ModelConfig = ModelConfig()
    hardware: HardwareConfig = HardwareConfig()
    data: DataConfig
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    dpo: DPOConfig = DPOConfig()
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
        """Raises all misfits in one error, one per line, starting with the dotted name of the setting to change.

        The caller may add those of the pipeline, whose stages are not known here (`context["misfits"]`).
        """
        misfits = [
            *self._too_many_at_least(),
            *self._uneven_batches(),
            *self._undivided_sequences(),
            *(info.context["misfits"](self) if info.context else ()),
        ]
        if "ppo" in self.pipeline:
            misfits += [*self._unknown_reward_models(), *self._uneven_minibatches()]
            misfits += [*self._unshared_prompts(), *self._adapters_for_vllm(), *self._late_rewards()]
            misfits += self._misfit_samplers()
        if misfits:
            raise ValueError("\n".join(misfits))
        return self

    def _unknown_reward_models(self) -> Iterator[str]:
        for key, name in self.ppo.reward_models.items():
            if name not in self.reward.models:
                yield f"ppo.{key} is {name!r}, but reward.models has {', '.join(self.reward.models)}"
        if self.ppo.rewards and not any(source.weight for source in self.ppo.rewards.values()):
            yield "ppo.rewards gives every reward the weight 0, so there is nothing to maximise"

    def _late_rewards(self) -> Iterator[str]:
        """While a worker waits for its functions, the others wait in a collective."""
        seconds = sum(source.timeout_s for source in self.ppo.rewards.values() if source.function)
        if seconds >= self.hardware.collective_timeout_s:
            yield (
                f"ppo.rewards: the functions may take {seconds:g} s (timeout_s), but the other workers wait "
                f"{self.hardware.collective_timeout_s:g} s at most (hardware.collective_timeout_s); raise that or lower these"
            )

    def _adapters_for_vllm(self) -> Iterator[str]:
        if self.ppo.sampling.engine == "vllm" and self.model.lora is not None:
            yield "ppo.sampling.engine is vllm, which samples from full weights only, but model.lora is set; use inprocess"

    def _misfit_samplers(self) -> Iterator[str]:
        sampling, workers = self.ppo.sampling, self.hardware.workers
        parts, key = sampling.tensor_parallel, "ppo.sampling.tensor_parallel"
        if sampling.workers and sampling.engine != "vllm":
            yield f"ppo.sampling.workers is {sampling.workers}, but only vllm samples beside the workers (ppo.sampling.engine)"
        if sampling.workers and parts > 1:
            yield f"{key} is {parts}, but samplers beside the workers (ppo.sampling.workers) have one device each"
        if parts == 1:
            return
        if sampling.engine != "vllm":
            yield f"{key} is {parts}, but only vllm divides a model (ppo.sampling.engine is {sampling.engine})"
        if workers % parts:
            yield f"{key} is {parts}, which does not divide the {workers} workers (hardware.workers)"
        if sampling.one_step_off_policy:
            yield f"{key} is {parts}: workers that sample together cannot train meanwhile (ppo.sampling.one_step_off_policy)"

    def _too_many_at_least(self) -> Iterator[str]:
        least, workers = self.hardware.min_workers, self.hardware.workers
        if least is not None and least > workers:
            yield f"hardware.min_workers is {least}, which is more than hardware.workers ({workers})"

    def _uneven_batches(self) -> Iterator[str]:
        """Under ZeRO-3 every rank must make the same number of forward passes, or all wait for ever."""
        own = self.hardware.workers_per_reward_model is not None
        for stage, (total, workers) in self._batches().items():
            name = "ppo.minibatch_size" if stage == "ppo" else f"{stage}.batch_size"
            key = "hardware.workers_per_reward_model" if stage == "reward" and own else "hardware.workers"
            if total % workers:
                kind = "workers" if self.hardware.sequence_parallel == 1 else "groups of workers"
                yield f"{name} is {total}, which is not a multiple of {workers} {kind} ({key})"

    def _undivided_sequences(self) -> Iterator[str]:
        together, key = self.hardware.sequence_parallel, "hardware.sequence_parallel"
        if together == 1:
            return
        for name in ("workers", "workers_per_reward_model"):
            workers = getattr(self.hardware, name)
            if workers is not None and workers % together:
                yield f"{key} is {together}, which does not divide the {workers} workers (hardware.{name})"
        if "dpo" in self.pipeline:
            yield f"{key} is {together}, but dpo does not divide sequences; leave it out of the pipeline, or set it to 1"
        if self.model.attention != "sdpa":
            yield f"{key} is {together}, but only model.attention sdpa divides sequences (it is {self.model.attention})"
        if self.model.path == "tiny" and self.model.tiny.heads % together:
            yield f"{key} is {together}, which does not divide the {self.model.tiny.heads} heads of model.tiny"
        workers, rows = self.hardware.workers, self.ppo.batch_size
        if "ppo" in self.pipeline and rows % (workers * self.ppo.group_size):
            yield (
                f"ppo.batch_size is {rows}, of which {workers} workers (hardware.workers) cannot sample equally many "
                f"groups of {self.ppo.group_size} (ppo.group_size)"
            )

    def _batches(self) -> dict[str, tuple[int, int]]:
        """(rows of an optimizer step, workers or groups of them that read rows of their own) of each stage of the
        pipeline."""
        batches = {}
        for stage in self.pipeline:
            own = getattr(self, stage, None)
            if isinstance(own, SupervisedConfig | PPOConfig):
                size = own.minibatch_size if isinstance(own, PPOConfig) else own.batch_size
                workers = self.reward_workers if stage == "reward" else self.hardware.workers
                batches[stage] = (size, max(workers // self.hardware.sequence_parallel, 1))
        return batches

    def _uneven_minibatches(self) -> Iterator[str]:
        rows, left = divmod(*self._batches()["ppo"])
        if left == 0 and rows % self.ppo.group_size:
            yield (
                f"ppo.group_size is {self.ppo.group_size}, which does not divide the {rows} rows that a "
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
                f"model.attention is {attention}, which takes no mask by which packed responses could share their prompt "
                "(ppo.packing, ppo.group_size); use sdpa"
            )

    def with_fitting_micro_batches(self) -> RunConfig:
        """Lowers each stage's micro_batch_size to the nearest divisor of a worker's rows of the batch."""

        def fit(stage: SupervisedConfig | PPOConfig, rows: int) -> Settings:
            sizes = range(min(stage.micro_batch_size, rows), 0, -1)
            return stage.model_copy(update={"micro_batch_size": next(size for size in sizes if rows % size == 0)})

        rows_of = {stage: total // workers for stage, (total, workers) in self._batches().items()}
        return self.model_copy(update={stage: fit(getattr(self, stage), rows) for stage, rows in rows_of.items()})


def public(config: RunConfig) -> dict[str, Any]:
    """All settings without secrets."""
    return without_secrets(config.model_dump(mode="json"))
