"""--tasks: benchmarks of lm-eval, run by its own library."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.evaluate.policy.policies import Settings, device, is_endpoint
from launch.model_folder import model_folder
from rlhf.errors import UserError
from rlhf.evaluation.statistics import Estimate
from rlhf.models import load_tokenizer

Z = 1.96  # of a 95 % interval


def check_tasks(settings: Settings, policies: Sequence[str]) -> None:
    """UserError (2) without the library, for an unknown task, and for a policy behind an endpoint."""
    if not settings.tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-eval, which is not installed: pip install 'rlhf-pipeline[eval]'")
    if served := [policy for policy in policies if is_endpoint(policy)]:
        raise UserError(f"--tasks: {served[0]} tells no probabilities, which tasks need; leave one of them out")
    known = set(_manager(settings.tasks).match_tasks(_names(settings.tasks)))
    if unknown := [name for name in _names(settings.tasks) if name not in known]:
        raise UserError(f"--tasks: lm-eval has no {', '.join(unknown)}; `lm-eval ls tasks` lists its tasks")


def run_tasks(model: str, settings: Settings) -> dict[str, dict[str, Estimate]]:
    """{task: {metric: estimate}}, with chat format where the tokenizer has one. UserError (8) for data that is not there."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    folder = model_folder(model)
    dtype = "bfloat16" if settings.precision == "bf16" else "float32"
    try:
        found: Any = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": dtype},
            tasks=_names(settings.tasks),
            task_manager=_manager(settings.tasks),
            batch_size=settings.batch_size,
            device=str(device()),
            apply_chat_template=bool(load_tokenizer(folder).chat_template),
            log_samples=False,
        )
    except OSError as error:  # also those of datasets and of the network
        raise UserError(f"--tasks {' '.join(settings.tasks)}: {type(error).__name__}: {error}", 8) from error
    counts = found.get("n-samples", {})
    return {
        task: _estimates(values, int(counts.get(task, {}).get("effective", 0)))
        for task, values in found["results"].items()
    }


def _estimates(values: dict[str, Any], count: int) -> dict[str, Estimate]:
    """`acc,none` and `acc_stderr,none` → acc; the name of a filter stays."""
    found = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        half = Z * error if isinstance(error, int | float) else float("nan")
        name = metric if filtered == "none" else f"{metric}.{filtered}"
        found[name] = Estimate(float(value), float(value) - half, float(value) + half, count)
    return found


def _names(tasks: Sequence[str]) -> list[str]:
    return [yaml.load(Path(task).read_text(), _Loader)["task"] if _is_file(task) else task for task in tasks]


def _manager(tasks: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    folders = [str(Path(task).parent) for task in tasks if _is_file(task)]
    return TaskManager(include_path=folders or None)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) and Path(task).is_file()


class _Loader(yaml.SafeLoader):
    """Passes over the tags of lm-eval, such as `!function`."""


_Loader.add_multi_constructor("!", lambda *_: None)
