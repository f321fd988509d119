"""The pipeline: SFT, then the reward models side by side, then PPO, then the report. What is complete is not done again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from launch import gang, report
from launch.terminal import StageBars, console
from launch.worker import FAILURE, read_failure, run_rank, run_under_torchrun
from rlhf import artifacts, lineage
from rlhf.artifacts import Artifact
from rlhf.config import RunConfig, stage_inputs
from rlhf.data import mix_preferences, split_held_out
from rlhf.errors import UserError
from rlhf.tracking import Tracker, absolute_uri, fill_in, mark_failed, open_parent, public_uri

POLL_S = 0.3
MADE_BY = "made_by.json"  # beside a stage's checkpoints: what they were made with


def run(config: RunConfig, fresh: bool) -> int:
    """Runs every stage that is not complete, and reports. Returns the exit code."""
    config = absolute(config)
    check_data(config, stages_of(config))
    if fresh:
        shutil.rmtree(config.folder, ignore_errors=True)
    config.folder.mkdir(parents=True, exist_ok=True)
    tracker = open_parent(config.folder, config.tracking, config.name)
    tracker.params({"stages": ", ".join(stages_of(config)), "seed": config.seed, "model": config.model.path})
    try:
        seconds = _run_stages(config, stages_of(config))
    except BaseException as error:
        reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", reason)
        raise
    _report(config, tracker, seconds)
    return 0


def run_stage(config: RunConfig, stage: str, local: bool, name: str | None) -> int:
    """One stage, or every reward model of the stage `reward` when no `name` is given."""
    config = absolute(config)
    chosen = [s for s in stages_of(config) if s.split("/")[0] == stage and name in (None, s.split("/")[-1])]
    if not chosen:
        raise UserError(f"reward.models has no {name!r}; it has {', '.join(config.reward.models)}.")
    for one in chosen:
        for needed in stage_inputs(config, one):
            if not (config.folder / needed / "artifact" / artifacts.MANIFEST).exists():
                raise UserError(
                    f"{one} starts from {needed}, which is not complete in {config.folder}. Run it first.", 4
                )
    check_data(config, chosen)
    for one in chosen:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            run_under_torchrun(config, one)
        elif local:
            _run_local(config, one)
        else:
            with gang.cluster(config), StageBars(config.folder) as bars:
                _drive(config, [one], bars)
    return 0


def stages_of(config: RunConfig) -> list[str]:
    return ["sft", *(f"reward/{name}" for name in config.reward.models), "ppo"]


def absolute(config: RunConfig) -> RunConfig:
    """`config` with its own paths made absolute: workers have other working folders."""
    tracking = config.tracking
    if tracking.uri is not None:
        tracking = tracking.model_copy(update={"uri": absolute_uri(tracking.uri)})
    model = config.model
    if Path(model.path).is_dir():
        model = model.model_copy(update={"path": str(Path(model.path).absolute())})
    return config.model_copy(
        update={
            "runs_dir": config.runs_dir.absolute(),
            "tracking": tracking,
            "model": model,
            "data": config.data.model_copy(update={"root": config.data.root.absolute()}),
        }
    )


def check_data(config: RunConfig, stages: Sequence[str]) -> None:
    """UserError (3) for data that one of `stages` could not use: now, and not hours later when its turn has come."""
    for stage in stages:
        data = lineage.stage_data(config, stage)
        if stage.startswith("reward/"):
            mix_preferences(data["preferences"].train, config.reward.models[stage.split("/")[1]], config.seed)
        elif stage == "ppo":
            split_held_out(data["prompts"].held_out, config.ppo.eval_prompts)


def complete_artifact(config: RunConfig, stage: str) -> Artifact | None:
    """The stage's artifact, if it is whole and was made from today's settings, data and parents."""
    inputs = {name: complete_artifact(config, name) for name in stage_inputs(config, stage)}
    if None in inputs.values():
        return None
    parents = lineage.parents(lineage.stage_data(config, stage), inputs)  # type: ignore[arg-type]
    return artifacts.find(config.folder / stage / "artifact", lineage.settings_digest(config, stage), parents)


def _run_stages(config: RunConfig, stages: list[str]) -> dict[str, float]:
    """Seconds of each stage that ran. Stages whose inputs are there run side by side as far as the cluster has room."""
    waiting = []
    for stage in stages:
        if complete_artifact(config, stage) is None:
            waiting.append(stage)
        else:
            console.print(f"[green]✓[/green] {stage}: complete, with these settings and this data; skipped")
    if not waiting:
        return {}
    with gang.cluster(config), StageBars(config.folder) as bars:
        return _drive(config, waiting, bars)


def _run_local(config: RunConfig, stage: str) -> None:
    """The stage in this process, for debugging and for machines without a cluster."""
    _prepare(config, stage)
    with StageBars(config.folder) as bars, bars.followed(stage):
        run_rank(config, stage, local=True)


def _drive(config: RunConfig, waiting: list[str], bars: StageBars) -> dict[str, float]:
    running: dict[str, tuple[gang.Gang, float]] = {}
    seconds: dict[str, float] = {}
    while waiting or running:
        for stage in [s for s in waiting if not set(stage_inputs(config, s)) & {*waiting, *running}]:
            waiting.remove(stage)
            _prepare(config, stage)
            bars.add(stage)
            running[stage] = gang.Gang(config, stage, workers_of(config, stage)), time.monotonic()
        for stage, (one, started) in list(running.items()):
            if one.done(POLL_S / len(running)):
                del running[stage]
                _finish(config, stage, one, bars)
                seconds[stage] = time.monotonic() - started
        bars.refresh()
    return seconds


def _prepare(config: RunConfig, stage: str) -> None:
    """Clears what an earlier attempt left behind; its checkpoints stay if they were made with these settings."""
    folder = config.folder / stage
    made_by = folder / MADE_BY
    attempt = {"settings": lineage.settings_digest(config, stage), "workers": workers_of(config, stage)}
    known = json.loads(made_by.read_text()) if made_by.exists() else {}
    if known.get("settings") != attempt["settings"]:
        shutil.rmtree(folder, ignore_errors=True)
    elif known["workers"] != attempt["workers"] and any((folder / "checkpoints").glob("*")):
        raise UserError(
            f"{folder / 'checkpoints'} was written by {known['workers']} workers and cannot go on with "
            f"{attempt['workers']}. Set hardware.workers back, or remove that folder to start {stage} over."
        )
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(made_by, attempt)
    for stale in (FAILURE, "progress.json"):
        (folder / stale).unlink(missing_ok=True)


def workers_of(config: RunConfig, stage: str) -> int:
    return config.reward_workers if stage.startswith("reward/") else config.hardware.workers


def _finish(config: RunConfig, stage: str, one: gang.Gang, bars: StageBars) -> None:
    """Raises one clear error when the gang failed."""
    try:
        one.result()
    except Exception as error:  # noqa: BLE001  whatever Ray wraps around it, people get one message
        bars.finish(stage, "failed")
        failure = read_failure(config.folder / stage) or _death(error, stage)
        mark_failed(config.folder / stage, failure.message)
        logs = config.folder / stage / "logs"
        raise UserError(
            f"{stage} failed: {failure.message}\nThe logs of its workers are in {logs}", failure.exit_code
        ) from None
    bars.finish(stage, "done")


def _death(error: Exception, stage: str) -> UserError:
    """Why a worker died that had no time to say so itself."""
    text = str(error)
    if "out of memory" in text.lower() or "OutOfMemory" in text:
        key = f"{stage.split('/')[0]}.micro_batch_size"
        return UserError(f"a worker was killed because the machine ran out of memory. Lower {key}, or give more.", 5)
    return UserError(f"a worker died: {text.strip().splitlines()[-1][:300]}", 6)


def _report(config: RunConfig, tracker: Tracker, seconds: dict[str, float]) -> None:
    """Writes report and plots, sends them and what MLflow missed, and shows the closing table."""
    record = config.folder / "seconds.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    known |= {stage: round(value, 1) for stage, value in seconds.items()}
    artifacts.write_json(record, known)
    uri = config.tracking.uri
    extra = {
        "seconds": known,
        "artifacts": {stage: str(config.folder / stage / "artifact") for stage in stages_of(config)},
        "mlflow": {"tracking_uri": uri and public_uri(uri), "run_id": tracker.run_id},
    }
    result = report.build(config.folder, config, extra)
    tracker.metrics(report.headline(result), step=0)
    for path in (*config.folder.glob("report.*"), *sorted((config.folder / "plots").glob("*.png"))):
        tracker.artifact(path)
    tracker.close()
    fill_in(config.folder, config.tracking)
    console.print(report.render(result))
