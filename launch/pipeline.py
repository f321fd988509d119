"""The pipeline: its stages as soon as their inputs are there, then the report. What is complete is not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launch import aside, base_model, parent_run, report, signals, worker_group
from launch.drive import DrivenRun, Driver
from launch.stage_folder import Data, complete_artifact, prepare
from launch.terminal import StageBars, console
from launch.worker import run_rank, torchrun_group
from rlhf.config import RunConfig
from rlhf.data import Split, parsed
from rlhf.errors import UserError
from rlhf.runs import artifacts, claim, provenance, stopping
from rlhf.runs.chat_format import notice
from rlhf.runs.guard import guarded
from rlhf.tracking import Tracker, absolute_uri, close_abandoned, fill_in, mark_ended, public_uri
from stages.base import parts_of, stage_of


def run(config: RunConfig, fresh: bool) -> int:
    """Runs every stage that is not complete, and reports. Returns the exit code."""
    config = absolute(config)
    with signals.handled(), claim.hold(config.folder):
        stopping.forget(config.folder)
        return _run(config, fresh)


def _run(config: RunConfig, fresh: bool) -> int:
    if fresh:
        (config.folder / base_model.RECORD).unlink(missing_ok=True)
    config = base_model.with_commit(config)
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
        _run_under_torchrun(base_model.with_commit(config), chosen)
        return 0
    with signals.handled(), claim.hold(config.folder):
        stopping.forget(config.folder)
        config = base_model.with_commit(config)
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
    check_data(config, stages, data)
    return data


def check_data(config: RunConfig, stages: Sequence[str], data: Data) -> None:
    for stage in stages:
        stage_of(stage).check_data(config, stage, data)


def _run_stages(config: RunConfig, data: Data) -> dict[str, float]:
    """Seconds of each stage that ran. Stages whose inputs are there run side by side as far as the cluster has room."""
    waiting = []
    for stage in parts_of(config):
        if (found := complete_artifact(config, stage, data)) is None:
            waiting.append(stage)
        else:
            console.print(f"[green]✓[/green] {stage}: complete, with these settings and this data; skipped")
            aside.say_revision(stage, "it was", found.code_revision)
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
    prepare(config, stage, data)
    base_model.fetch_here(config)
    bars = StageBars(config.folder)
    with bars, bars.followed(stage), signals.gentle(stopping.request), guarded(claim.followed(config.folder)):
        run_rank(config, stage, local=True)


def _run_under_torchrun(config: RunConfig, stages: Sequence[str]) -> None:
    """The stages, one after the other, as one of the ranks that torchrun started, with the first rank's settings."""
    from rlhf.distributed import collectives

    base_model.fetch_here(config)  # before the group, whose collectives would not wait for it
    data: dict[str, Split] = {}  # stays empty on all ranks but the first

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
                collectives.broadcast_result(lambda stage=stage: prepare(of_first, stage, data))
                with guarded(claim.followed(of_first.folder)):
                    run_rank(of_first, stage, local=False)


def _drive(config: RunConfig, waiting: list[str], data: Data, bars: StageBars) -> dict[str, float]:
    """Seconds of each stage."""
    run = DrivenRun(config, data, waiting)
    for ended in Driver([run], bars).ended():
        if ended.failure:
            raise ended.failure from None
    return run.seconds


def _report(config: RunConfig, tracker: Tracker, seconds: Mapping[str, float]) -> None:
    console.print(report.render(write_report(config, tracker, seconds)))


def write_report(config: RunConfig, tracker: Tracker, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Writes report and plots, and sends them and what MLflow missed. Returns the report."""
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
    return result
