"""Training engines: `LocalEngine` is plain torch in one process, `ZeroEngine` is DeepSpeed.

All code about shards is here. Both engines divide by a count over all ranks and micro-batches, which the caller passes,
so world size and gradient accumulation cannot change the result.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import HardwareConfig, OptimConfig
from rlhf.distributed import collectives, training_state

BUCKET_BYTES = 256 << 20
BUCKET_ELEMENTS = 50_000_000  # of gradients; DeepSpeed's default of half a billion uses 2 GB per worker


def learning_rate_fraction(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Fraction of `optim.lr` at `step` (0-based): linear warm-up, then constant or a cosine down to `min_lr_ratio`."""
    warmup = max(round(optim.warmup_ratio * total_steps), optim.min_warmup_steps)
    warmup = min(warmup, max(total_steps - 1, 0))
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on norms and biases.

    Fused, which reads memory once and needs no temporary tensors, on a CPU too.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    shape = [getattr(p, "ds_shape", p.shape) for p in trainable]  # a sharded parameter is flat
    groups = [
        {
            "params": [p for p, s in zip(trainable, shape, strict=True) if len(s) >= 2],
            "weight_decay": optim.weight_decay,
        },
        {"params": [p for p, s in zip(trainable, shape, strict=True) if len(s) < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, total_steps: int):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_fraction(step, optim, total_steps))


class LocalEngine:
    """Plain torch, one process. Frozen when `optim` is None."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig | None, total_steps: int, hardware: HardwareConfig
    ) -> None:
        self.module = with_frozen_weights(module, hardware) if optim else frozen(module, hardware)
        self.device = next(module.parameters()).device
        self.sequence_parallel = 1
        self.precision = hardware.precision
        self.max_grad_norm = optim.max_grad_norm if optim else math.inf
        self.optimizer = build_optimizer(module, optim) if optim else None
        self.schedule = build_schedule(self.optimizer, optim, total_steps) if self.optimizer and optim else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.module(*args, **kwargs)

    def steady(self) -> AbstractContextManager[Any]:
        """A context in which no weight changes, so each is cast to bf16 once instead of in every forward pass."""
        return keep_casts(self.device)

    def backward(self, loss_sum: Tensor, count: float, last: bool) -> None:
        """Adds the gradient of loss_sum / count; `count` is over all ranks and micro-batches of the step."""
        del last
        (loss_sum / max(count, 1)).backward()

    def step(self) -> float:
        """One optimizer step with the accumulated gradients. Returns the gradient norm before clipping."""
        assert self.optimizer is not None and self.schedule is not None, "a frozen engine cannot step"
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trainable, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return float(norm)

    @property
    def lr(self) -> float:
        assert self.optimizer is not None
        return self.optimizer.param_groups[0]["lr"]

    def save(self, folder: Path) -> None:
        training_state.save(folder, self.module, self.optimizer, self.schedule)

    def load(self, folder: Path) -> None:
        training_state.load(folder, self.module, self.optimizer, self.schedule)


class ZeroEngine:
    """DeepSpeed ZeRO over all ranks of the default process group. Frozen (and still sharded) when `optim` is None."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig | None, total_steps: int, hardware: HardwareConfig
    ) -> None:
        deepspeed = import_deepspeed()
        with_frozen_weights(module, hardware) if optim else frozen(module, hardware)
        optimizer = build_optimizer(module, optim) if optim else None
        schedule = build_schedule(optimizer, optim, total_steps) if optimizer and optim else None
        config = zero_config(hardware, optim.max_grad_norm if optim else 0.0)
        if optim is None and hardware.zero_stage < 3:
            config["zero_optimization"]["stage"] = 0  # stages 1 and 2 shard optimizer states and gradients only
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=schedule, config=config, dist_init_required=False
        )
        collectives.share_time_limit()
        self.module = module
        self.device = self.engine.device
        self.precision = hardware.precision
        self.sequence_parallel = hardware.sequence_parallel
        self.data_ranks = collectives.data_ranks(self.sequence_parallel)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def steady(self) -> AbstractContextManager[Any]:
        """As in `LocalEngine` if weights are whole; caching casts of shards would keep the whole model on every
        rank."""
        whole = self.engine.zero_optimization_stage() < 3
        return keep_casts(self.device) if whole else contextlib.nullcontext()

    def backward(self, loss_sum: Tensor, count: float, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; the count is global already, so the average becomes a sum again. Ranks
        # that share sequences compute one loss together, whose parts `sum_of_slices` weighs.
        self.engine.backward(loss_sum * (self.data_ranks / max(count, 1)))

    def step(self) -> float:
        stage_0 = self.engine.zero_optimization_stage() == 0
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None and stage_0]
        norm = torch.nn.utils.get_total_norm(gradients)  # stage 0 does not report it afterwards
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or norm)

    @property
    def lr(self) -> float:
        return self.engine.get_lr()[0]

    def save(self, folder: Path) -> None:
        training_state.save(folder, self.module, self.engine.optimizer, self.engine.lr_scheduler)

    def load(self, folder: Path) -> None:
        training_state.load(folder, self.module, self.engine.optimizer, self.engine.lr_scheduler)


Engine = LocalEngine | ZeroEngine


def keep_casts(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast's copies of weights, which it drops at the end of its outermost context."""
    return torch.autocast(device.type, enabled=False)


def frozen(module: nn.Module, hardware: HardwareConfig) -> nn.Module:
    """`module` without gradients, with weights as in `with_frozen_weights`."""
    return with_frozen_weights(module.requires_grad_(False), hardware)


def with_frozen_weights(module: nn.Module, hardware: HardwareConfig) -> nn.Module:
    """In a bf16 run, stores frozen weights of matrix products (all of a frozen model, or those under adapters) in bf16,
    as autocast would cast them in every forward pass: half the memory and the same results. Embeddings, norms and our
    float32 heads stay float32."""
    if hardware.precision == "bf16":
        tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        products = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)} - tables
        for parameter in (p for p in module.parameters() if not p.requires_grad):
            dtype = torch.bfloat16 if id(parameter) in products else parameter.dtype
            for holder in (parameter, getattr(parameter, "ds_tensor", None)):  # the weight, its shard
                if holder is not None:
                    # Copy the others too: a tensor that is mapped from the file keeps the whole file in memory.
                    holder.data = holder.data.to(dtype, copy=True)
    return module


def _buckets(named: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Groups of parameters of about `BUCKET_BYTES`; `ds_numel` is the whole size of a sharded parameter."""
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        bucket.append((name, parameter))
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def open_engine(
    module: nn.Module, optim: OptimConfig | None, total_steps: int, hardware: HardwareConfig, local: bool
) -> Engine:
    kind = LocalEngine if local else ZeroEngine
    return kind(module, optim, total_steps, hardware)


def full_parameters(module: nn.Module, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, whole, with its name; copy it before taking the next one. All ranks must iterate over all of
    them.

    Shards are gathered in buckets, so the peak is one bucket of additional memory.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad or not trainable_only]
    for bucket in _buckets(named):
        sharded = [p for _, p in bucket if hasattr(p, "ds_id")]
        with import_deepspeed().zero.GatheredParameters(sharded) if sharded else contextlib.nullcontext():
            yield from ((name, parameter.detach()) for name, parameter in bucket)


def zero_config(hardware: HardwareConfig, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's settings for `ZeroEngine`."""
    zero: dict[str, Any] = {"stage": hardware.zero_stage, "overlap_comm": False, "reduce_bucket_size": BUCKET_ELEMENTS}
    if hardware.offload_to_cpu and hardware.zero_stage >= 2:
        zero["offload_optimizer"] = {"device": "cpu"}
        if hardware.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        # Given a torch optimizer: DeepSpeed's own would compile an extension.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }
    if hardware.precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def trainer_zero_config(hardware: HardwareConfig) -> dict[str, Any]:
    """DeepSpeed's settings for a transformers Trainer, which replaces `auto`."""
    config = zero_config(hardware, 0.0)
    config |= {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return config


@contextlib.contextmanager
def sharded_loading(hardware: HardwareConfig, local: bool) -> Iterator[None]:
    """A context in which `from_pretrained` shards each weight as it is read, so no rank holds the whole model."""
    if local or hardware.zero_stage < 3:
        yield
        return
    import_deepspeed()
    torch.set_autocast_cache_enabled(False)  # it keeps bf16 copies of all weights until the end of a forward pass
    from transformers.integrations import deepspeed as hf

    config = hf.HfDeepSpeedConfig(zero_config(hardware, 0.0))  # must stay alive while models load
    try:
        yield
    finally:
        del config
        hf.unset_hf_deepspeed_config()


def end_sharded_loading() -> None:
    """Ends sharded loading, which a Trainer switches on for the whole process."""
    from transformers.integrations import deepspeed as hf

    hf.unset_hf_deepspeed_config()


def prepare_environment() -> None:
    """Sets the environment variables that DeepSpeed reads when it is imported.

    Its CPU communication is compiled once, at installation; it needs the same ninja to find it again.
    """
    if (compiled := Path(sys.prefix) / "torch_extensions").is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled))
        path, own = os.environ.get("PATH", ""), str(Path(sys.prefix) / "bin")
        if own not in path.split(os.pathsep):
            os.environ["PATH"] = f"{own}{os.pathsep}{path}"
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")


def import_deepspeed() -> Any:
    """DeepSpeed, with its accelerator chosen and its log silenced."""
    prepare_environment()
    warnings.filterwarnings("ignore", message=".*barrier.*|.*all_gather_into_tensor.*|.*_base is deprecated.*")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    return deepspeed
