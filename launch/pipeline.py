"""The pipeline: its stages as soon as their inputs are there, then the report. What is complete is not done again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from launch import parent_run, report, signals, worker_group
from launch.terminal import StageBars, console
from launch.worker import FAILURE, read_failure, run_rank, torchrun_group
from rlhf.config import RunConfig
from rlhf.data import Split, parsed
from rlhf.errors import UserError
from rlhf.runs import artifacts, claim, provenance, stopping
from rlhf.runs.artifacts import Artifact
from rlhf.runs.chat_format import notice
from rlhf.tracking import (
    Tracker,
    absolute_uri,
    close_abandoned,
    fill_in,
    keep_earlier,
    mark_ended,
    public_uri,
    status_of,
)
from stages.base import parts_of, stage_of

POLL_S = 0.3
Data = dict[str, Split]
"""Role → rows, of every role of the run."""

MADE_BY = "made_by.json"  # beside a stage's checkpoints: what they were made with


def run(config: RunConfig, fresh: bool) -> int:
    """Runs every stage that is not complete, and reports. Returns the exit code."""
    config = absolute(config)
    with signals.handled(), claim.hold(config.folder):
        stopping.forget(config.folder)
        return _run(config, fresh)


def _run(config: RunConfig, fresh: bool) -> int:
    data = checked_data(config, parts_of(config))
    close_abandoned(config.runs_dir, config.tracking)
    if fresh:
        parent_run.remove(config)
    parsed.write(config, data)
    tracker = parent_run.begin(config, data)
    try:
        seconds = _run_stages(config, data)
    except claim.TakenOver:  # nothing may be written any more
        raise
    except BaseException as error:
        parent_run.fail(config, tracker, error)
        raise
    _report(config, tracker, seconds)
    return 0


def run_stage(config: RunConfig, stage: str, local: bool, name: str | None) -> int:
    """One stage: all its parts (every reward model), or the one called `name`."""
    config = absolute(config)
    chosen = [f"{stage}/{name}"] if name else stage_of(stage).parts_of(config)
    if not {*chosen} <= {*parts_of(config)}:
        raise UserError(f"this run has no {', '.join(chosen)}; its pipeline makes {', '.join(parts_of(config))}")
    for one in chosen:
        for needed in stage_of(one).inputs(config):
            if not (config.folder / needed / "artifact" / artifacts.MANIFEST).exists():
                raise UserError(
                    f"{one} starts from {needed}, which is not complete in {config.folder}. Run it first.", 4
                )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _run_under_torchrun(config, chosen)
        return 0
    with signals.handled(), claim.hold(config.folder):
        stopping.forget(config.folder)
        data = checked_data(config, chosen)
        close_abandoned(config.runs_dir, config.tracking)
        parsed.write(config, data)
        try:
            for one in chosen:
                _run_one(config, one, data, local)
        except KeyboardInterrupt:  # the workers had no time to say so
            for one in chosen:
                mark_ended(config.folder / one, "KILLED", "interrupted")
            raise
    return 0


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


def checked_data(config: RunConfig, stages: Sequence[str]) -> Data:
    """The data of the run. UserError (3) for what one of `stages` could not use: now, not when its turn has come."""
    if chosen := notice(config):
        console.print(chosen, style="yellow", markup=False, highlight=False)
    data = provenance.parse_data(config)
    roles = dict.fromkeys(role for stage in stages for role in stage_of(stage).roles)
    for finding in dict.fromkeys(finding for role in roles for finding in data[role].findings):
        console.print(f"data: {finding}", style="yellow", markup=False, highlight=False)
    for stage in stages:
        stage_of(stage).check_data(config, stage, data)
    return data


def complete_artifact(config: RunConfig, stage: str, data: Data) -> Artifact | None:
    """The stage's artifact, if it is whole and was made from today's settings, data and parents."""
    inputs = {name: complete_artifact(config, name, data) for name in stage_of(stage).inputs(config)}
    if None in inputs.values():
        return None
    parents = _parents(stage, data, inputs)  # type: ignore[arg-type]
    return artifacts.find(config.folder / stage / "artifact", _digest(config, stage), parents)


def _parents(stage: str, data: Data, inputs: dict[str, Artifact]) -> dict[str, str]:
    return provenance.parents({role: data[role] for role in stage_of(stage).roles}, inputs)


def _digest(config: RunConfig, stage: str) -> str:
    return provenance.settings_digest(config, stage, stage_of(stage).roles)


def _run_stages(config: RunConfig, data: Data) -> dict[str, float]:
    """Seconds of each stage that ran. Stages whose inputs are there run side by side as far as the cluster has room."""
    waiting = []
    for stage in parts_of(config):
        if complete_artifact(config, stage, data) is None:
            waiting.append(stage)
        else:
            console.print(f"[green]✓[/green] {stage}: complete, with these settings and this data; skipped")
    if not waiting:
        return {}
    with worker_group.cluster(config), StageBars(config.folder) as bars:
        return _drive(config, waiting, data, bars)


def _run_one(config: RunConfig, stage: str, data: Data, local: bool) -> None:
    if local:
        _run_local(config, stage, data)
    else:
        with worker_group.cluster(config), StageBars(config.folder) as bars:
            _drive(config, [stage], data, bars)


def _run_local(config: RunConfig, stage: str, data: Data) -> None:
    """The stage in this process, for debugging and for machines without a cluster."""
    _prepare(config, stage, data)
    with StageBars(config.folder) as bars, bars.followed(stage), signals.gentle(stopping.request):
        run_rank(config, stage, local=True)


def _run_under_torchrun(config: RunConfig, stages: Sequence[str]) -> None:
    """The stages, one after the other, as one of the ranks that torchrun started, with the first rank's settings."""
    from rlhf.distributed import collectives

    data: Data = {}  # stays empty on all ranks but the first

    def parse() -> None:
        data.update(checked_data(of_first, stages))
        parsed.write(of_first, data)

    with signals.handled(), signals.gentle(stopping.request), torchrun_group(config):
        of_first, stages = collectives.broadcast_result(lambda: (config, stages))
        with ExitStack() as held:
            key = collectives.broadcast_result(lambda: held.enter_context(claim.hold(of_first.folder)))
            claim.follow(of_first.folder, key)
            collectives.rank_zero_only(parse, "reading the data")
            for stage in stages:
                collectives.broadcast_result(lambda stage=stage: _prepare(of_first, stage, data))
                run_rank(of_first, stage, local=False)


def _drive(config: RunConfig, waiting: list[str], data: Data, bars: StageBars) -> dict[str, float]:
    """Starts every stage when its inputs are there, until all are done or somebody stops the run. Seconds of each."""
    with signals.gentle(lambda number: stopping.ask(config.folder, number)):
        return _drive_until_stopped(config, waiting, data, bars)


def _drive_until_stopped(config: RunConfig, waiting: list[str], data: Data, bars: StageBars) -> dict[str, float]:
    running: dict[str, tuple[worker_group.WorkerGroup, float]] = {}
    seconds: dict[str, float] = {}
    stopped: list[UserError] = []
    while running or (waiting and not signals.pending()):
        claim.require()
        for stage in [s for s in waiting if not set(stage_of(s).inputs(config)) & {*waiting, *running}]:
            waiting.remove(stage)
            _prepare(config, stage, data)
            bars.add(stage)
            running[stage] = worker_group.WorkerGroup(config, stage, stage_of(stage).workers(config)), time.monotonic()
        for stage, (one, started) in list(running.items()):
            if one.done(POLL_S / len(running)):
                del running[stage]
                try:
                    _finish(config, stage, one, bars)
                except UserError as error:  # those beside it stop after their step too
                    if not error.is_stop:
                        raise
                    stopped.append(error)
                seconds[stage] = time.monotonic() - started
        bars.refresh()
    if signals.pending():
        name = signal.Signals(signals.pending()).name
        raise stopped[0] if stopped else UserError(f"stopped by {name} between two stages", 128 + signals.pending())
    return seconds


def _prepare(config: RunConfig, stage: str, data: Data) -> None:
    """Clears what an earlier attempt left behind; its checkpoints stay if it started from the same. Any
    number of workers can go on from them."""
    folder = config.folder / stage
    made_by = folder / MADE_BY
    inputs = {name: artifacts.load(config.folder / name / "artifact") for name in stage_of(stage).inputs(config)}
    parents = _parents(stage, data, inputs)
    attempt = {"from": artifacts.digest_of([_digest(config, stage), parents])}
    known = json.loads(made_by.read_text()) if made_by.exists() else {}
    if known.get("from") != attempt["from"]:
        keep_earlier(config.folder, config.tracking, stage)
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(made_by, attempt)
    for stale in (FAILURE, "progress.json"):
        (folder / stale).unlink(missing_ok=True)


def _finish(config: RunConfig, stage: str, one: worker_group.WorkerGroup, bars: StageBars) -> None:
    """Raises one clear error when the worker group failed."""
    try:
        one.result()
    except Exception as error:  # noqa: BLE001  whatever Ray wraps around it, people get one message
        failure = read_failure(config.folder / stage) or _death(error, stage, config)
        bars.finish(stage, "stopped" if failure.is_stop else "failed")
        mark_ended(config.folder / stage, status_of(failure), failure.message)
        if failure.is_stop:
            raise UserError(f"{stage}: {failure.message}", failure.exit_code) from None
        logs = config.folder / stage / "logs"
        raise UserError(
            f"{stage} failed: {failure.message}\nThe logs of its workers are in {logs}", failure.exit_code
        ) from None
    bars.finish(stage, "done")


def _death(error: Exception, stage: str, config: RunConfig) -> UserError:
    """Why a worker died that had no time to say so itself."""
    text = str(error)
    if "out of memory" in text.lower() or "OutOfMemory" in text:
        name = stage_of(stage).name
        by_tokens = getattr(getattr(config, name), "micro_batch_tokens", None) is not None
        key = f"{name}.micro_batch_{'tokens' if by_tokens else 'size'}"
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
        "artifacts": {stage: str(config.folder / stage / "artifact") for stage in parts_of(config)},
        "mlflow": {"tracking_uri": uri and public_uri(uri), "run_id": tracker.run_id},
    }
    result = report.build(config.folder, config, extra)
    parent_run.finish(config, tracker, result)
    fill_in(config.folder, config.tracking)
    console.print(report.render(result))
