"""Common parts of the stages on TRL trainers: settings of a transformers Trainer, callbacks, checkpoints."""

from __future__ import annotations

import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from rlhf.config import OptimConfig, RunConfig, SupervisedConfig
from rlhf.distributed import training_state
from rlhf.distributed.collectives import broadcast_result, share_time_limit, world_size
from rlhf.distributed.engine import build_optimizer, build_schedule, import_deepspeed, trainer_zero_config
from rlhf.errors import UserError
from rlhf.models import check_slices
from rlhf.runs import checkpoint, stopping
from rlhf.runs.context import StageContext
from rlhf.tracking import NOTHING


def trainer_arguments(
    config: RunConfig, settings: SupervisedConfig, context: StageContext, steps: int
) -> dict[str, Any]:
    """Keyword arguments of a TRL config; our callbacks evaluate, log and show progress."""
    accumulation = settings.batch_size // (settings.micro_batch_size * context.data_ranks)
    save_every = math.ceil(steps / (settings.checkpoints + 1))
    if not context.local:
        import_deepspeed()
    return {
        "output_dir": str(context.checkpoint_folder),
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",  # the rows are already in order
        "learning_rate": settings.optim.lr,
        "max_grad_norm": settings.optim.max_grad_norm,
        "bf16": config.hardware.precision == "bf16" and context.local,  # ZeRO has autocast in its own settings
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "use_cpu": context.device.type == "cpu",
        "deepspeed": None if context.local else trainer_zero_config(config.hardware),
        "seed": config.seed,
        "logging_steps": 1,
        "save_strategy": "steps" if settings.checkpoints else "no",
        "save_steps": save_every,
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": context.device.type == "cuda",
    }


def in_training_order(
    dataset: Dataset, lengths: Sequence[int], settings: SupervisedConfig, stage: str, seed: int
) -> Dataset:
    """The rows of every step, batch after batch: each epoch in a new order, with rows of similar length in one
    micro-batch.

    Full batches only, because a Trainer would also make a step of the remaining rows, in which each weighs more.
    UserError (3) if there is no full batch: a Trainer would end at once without a message.
    """
    size = settings.batch_size
    if len(dataset) < size:
        section, kind, remedy = stage.split("/")[0], "training rows", ""
        if getattr(settings, "packing", False):  # the files have more rows than are counted here
            kind, remedy = "packed rows of several texts each", f", or set {section}.packing to false"
        lower = f"lower {section}.batch_size ({size})"
        raise UserError(f"{stage}: {len(dataset)} {kind} are less than one batch; {lower}{remedy}", 3)
    steps = max(math.floor(settings.epochs * (len(dataset) // size)), 1)
    order: list[int] = []
    while len(order) < steps * size:
        order += epoch_order(lengths, size, f"{seed}/{len(order)}")
    return dataset.select(order[: steps * size])


def for_groups(dataset: Dataset, settings: SupervisedConfig, context: StageContext) -> Dataset:
    """Every micro-batch as often as there are ranks that read it: a Trainer deals them out to ranks after one another."""
    size, together = settings.micro_batch_size, context.sequence_parallel
    if together == 1:
        return dataset
    starts = range(0, len(dataset), size)
    return dataset.select([row for start in starts for _ in range(together) for row in range(start, start + size)])


def epoch_order(lengths: Sequence[int], batch_size: int, seed: str) -> list[int]:
    """Row numbers of one epoch's full batches. Batches are random; within one, rows are sorted by length, so a
    micro-batch needs little padding."""
    rows = random.Random(seed).sample(range(len(lengths)), len(lengths) // batch_size * batch_size)
    for start in range(0, len(rows), batch_size):
        rows[start : start + batch_size] = sorted(rows[start : start + batch_size], key=lambda i: lengths[i])
    return rows


class OwnTraining:
    """Mixed into a Trainer: the project's AdamW, schedule and checkpoints, the same in all stages."""

    optim: OptimConfig

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = build_optimizer(model or self.model, self.optim)  # type: ignore[attr-defined]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:  # type: ignore[has-type]
            self.lr_scheduler = build_schedule(optimizer or self.optimizer, self.optim, num_training_steps)
        return self.lr_scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Instead of the Trainer's own, which only as many ranks as have written it can read."""
        folder = checkpoint.of_step(Path(self.args.output_dir), self.state.global_step)  # type: ignore[attr-defined]
        training_state.save(folder, *self._trained())
        if self.args.should_save:  # type: ignore[attr-defined]
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights are loaded with the state of the optimizer, which is made later."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if resume_from_checkpoint is not None:
            training_state.load(Path(resume_from_checkpoint), *self._trained())
        return prepared

    def _trained(self) -> tuple[Any, Any, Any]:
        return self.model, self.optimizer, self.lr_scheduler  # type: ignore[attr-defined]


class Reporter(TrainerCallback):
    """Sends a Trainer's metrics to the tracker and the progress bar, and evaluates held-out data a few times."""

    def __init__(
        self,
        context: StageContext,
        names: Mapping[str, str],
        shown: str,
        evals: int,
        measure: Callable[[], dict[str, float]],
    ) -> None:
        """`names`: the Trainer's name of a metric → ours. `shown`: the one for the progress bar.

        The bar also shows the last held-out metrics.
        """
        self.context, self.names, self.shown, self.evals, self.measure = context, names, shown, evals, measure
        self.measured: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        metrics = {ours: float(logs[theirs]) for theirs, ours in self.names.items() if theirs in (logs or {})}
        if not metrics:
            return
        self.context.tracker.metrics(metrics, step=state.global_step)
        shown = {name: metrics[name] for name in [self.shown] if name in metrics} | self.measured
        short = {name.split("/")[-1].replace("_", " "): value for name, value in shown.items()}
        self.context.progress.update(state.global_step, state.max_steps, **short)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = math.ceil(state.max_steps / self.evals)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.measured = self.measure()
            self.context.tracker.metrics(self.measured, step=state.global_step)


class CheckpointCommitter(TrainerCallback):
    """Commits a Trainer's checkpoint when it is complete; the Trainer itself would resume from the newest folder."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint.commit(checkpoint.of_step(Path(args.output_dir), state.global_step), {"step": state.global_step})


class TimeLimit(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """By now DeepSpeed has made its groups."""
        if world_size() > 1:
            share_time_limit()


class SlicesCheck(TrainerCallback):
    """Checks before the first step, when the model is sharded and readable, that its sequences can be divided."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        check_slices(model)


class Stopper(TrainerCallback):
    """Ends training after a step, with a checkpoint, when the run was asked to stop. The last step just ends the stage."""

    signal, step = 0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and (signal := stopping.due()):
            self.signal, self.step = signal, state.global_step
            control.should_save = control.should_training_stop = True


def fit(trainer: Any, reporter: Reporter) -> None:
    """Trains from the newest complete checkpoint on, with `reporter` instead of the Trainer's own logging.

    What was recorded after that checkpoint is removed, because those steps are made again. UserError (130, 143) when
    the run was asked to stop.
    """
    context = reporter.context
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(reporter)
    trainer.add_callback(CheckpointCommitter())
    trainer.add_callback(TimeLimit())
    trainer.add_callback(SlicesCheck())
    stopper = Stopper()
    trainer.add_callback(stopper)
    found = checkpoint.newest(context.checkpoint_folder)
    if found:
        broadcast_result(lambda: _require_json(found / TRAINER_STATE_NAME))
    context.tracker.rewind(checkpoint.number(found) if found else NOTHING)
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    if stopper.signal:
        raise stopping.stopped(stopper.signal, f"after step {stopper.step}")


def _require_json(path: Path) -> None:
    """UserError (4) instead of the error of the Trainer, which does not name the file."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is not JSON. Remove {path.parent} and run again.", 4) from None


def silence() -> None:
    """Silences the libraries in a worker's log, except for important warnings."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("transformers", "trl", "accelerate", "datasets", "torch.distributed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
