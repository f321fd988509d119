"""`rlhf sweep`: drives the cells of a grid side by side, and compares those that finish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from launch import base_model, pipeline, settings, signals, worker_group
from launch.compare.compare import page, show, write
from launch.compare.record import from_folders
from launch.compare.results import compare
from launch.drive import Driver, Ended, fits_now
from launch.evaluate.page import Page, markdown
from launch.parent_run import fail
from launch.preflight import preflight
from launch.report import rich_table
from launch.report.section import Table
from launch.stage_folder import Data, complete_artifact
from launch.sweep import record
from launch.sweep.cell import Cell
from launch.sweep.grid import Plan, plan
from launch.terminal import StageBars, console
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import claim, stopping
from rlhf.runs.artifacts import digest_of, write_atomic
from rlhf.tracking import Tracker, close_abandoned, fill_in
from stages.base import parts_of

RUNFILE = "run.yaml"  # in a cell's folder, for `rlhf run`
COMPARISON, REPORT = "comparison", "report.json"


def sweep(runfile: str, overrides: Sequence[str], seeds: int) -> int:
    """Runs every cell that is not finished, and compares the finished ones. UserError if one failed, at the end."""
    planned = _absolute(plan(runfile, overrides, seeds))
    for config in planned.cells:
        preflight(config)
    with signals.handled(), ExitStack() as held:
        for config in (planned.whole, *planned.cells):
            held.enter_context(claim.hold(config.folder))
            stopping.forget(config.folder)
        _sweep(planned)
    return 0


def _sweep(planned: Plan) -> None:
    whole = planned.whole
    cells = _cells([base_model.with_commit(cell, whole.folder) for cell in planned.cells])
    close_abandoned(whole.runs_dir, whole.tracking)
    tracker = record.begin(planned)
    try:
        _drive(whole, cells)
    except claim.TakenOver:  # nothing may be written any more
        raise
    except BaseException as error:
        for cell in cells:
            cell.interrupt(error)
        fail(whole, tracker, error)
        raise
    _end(whole, cells, tracker)


def _absolute(planned: Plan) -> Plan:
    return replace(
        planned, whole=pipeline.absolute(planned.whole), cells=tuple(pipeline.absolute(cell) for cell in planned.cells)
    )


def _cells(configs: Sequence[RunConfig]) -> list[Cell]:
    """Each with its run file in its folder. UserError (3) for data that a cell could not use."""
    read: dict[str, Data] = {}
    cells = []
    for config in configs:
        parts = parts_of(config)
        key = digest_of([config.data.model_dump(mode="json"), config.model.model_dump(mode="json")])
        if key in read:
            pipeline.check_data(config, parts, read[key])
        else:
            read[key] = pipeline.checked_data(config, parts)
        waiting = [part for part in parts if complete_artifact(config, part, read[key]) is None]
        was_finished = not waiting and (config.folder / REPORT).exists()
        cells.append(Cell(config, read[key], waiting, was_finished=was_finished))
    for config in configs:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(config.folder / RUNFILE, settings.dump(config))
    return cells


def _drive(whole: RunConfig, cells: Sequence[Cell]) -> None:
    for cell in cells:
        if cell.was_finished:
            console.print(f"[green]✓[/green] {cell.name}: finished, with these settings and this data; skipped")
        elif cell.is_over:
            cell.close()
    if all(cell.is_over for cell in cells):
        return
    with worker_group.cluster(whole), StageBars(whole.folder) as bars:
        for ended in Driver(cells, bars, fits_now).ended():
            _note(ended)


def _note(ended: Ended[Cell]) -> None:
    cell = ended.run
    if ended.failure is not None:
        cell.failure = cell.failure or ended.failure
        console.print(f"{cell.name}: {ended.failure.message}", style="red", markup=False)
    elif ended.shared is not None:
        cell.shared[ended.stage] = ended.shared
        console.print(f"{cell.name}/{ended.stage}: shared with {ended.shared.parents[ended.stage.count('/')].name}")
    if cell.is_over:
        cell.close()


def _end(whole: RunConfig, cells: Sequence[Cell], tracker: Tracker) -> None:
    """The comparison of what has finished, in the terminal, on a page and in MLflow."""
    finished, failed = [cell for cell in cells if not cell.failure], [cell for cell in cells if cell.failure]
    table, files, shown = _table(cells), [], Page(whole.name, [], [], [_table(cells)], {}, [], "")
    if len(finished) > 1:
        report = compare(from_folders([cell.config.folder for cell in finished]))
        show(report, console)
        files = write(report, whole.folder / COMPARISON, [table])
        shown = page(report, [table])
    console.print(rich_table(table))
    for path in files:
        console.print(str(path), markup=False)
    failure = f"{len(failed)} of {len(cells)} cells failed" if failed else ""
    record.finish(tracker, markdown(shown), files, failure)
    fill_in(whole.folder, whole.tracking)
    if failed:
        text = f"{failure}: {', '.join(cell.name for cell in failed)}. The same command tries them again."
        raise UserError(text, next(cell.failure.exit_code for cell in failed if cell.failure))


def _table(cells: Sequence[Cell]) -> Table:
    def end(cell: Cell) -> str:
        if cell.failure:
            return f"failed: {cell.failure.message.splitlines()[0]}"
        return "finished before" if cell.was_finished else "finished"

    return Table(
        f"Cells of {cells[0].config.runs_dir.name}", ("cell", "end"), [(cell.name, end(cell)) for cell in cells]
    )
