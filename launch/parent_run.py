"""The run of a whole pipeline in MLflow, by which people compare: its settings, data, report and how it ended."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from launch import report
from launch.base_model import RECORD
from rlhf.config import RunConfig, public
from rlhf.data import Split
from rlhf.errors import UserError
from rlhf.runs import artifacts, provenance
from rlhf.runs.artifacts import digest_of
from rlhf.runs.claim import CLAIM
from rlhf.tracking import NOTHING, Tracker, catch_up, keep_earlier, mark_ended, open_parent, status_of
from stages.base import STAGES, parts_of, stage_of

KEPT = ("earlier", CLAIM, RECORD)  # when a run starts over
OF_NO_RESULT = ("name", "runs_dir", "tracking")
RESPONSES = "held_out_answers"  # table; that of the PPO stage has the same name
DESCRIPTION, LONGEST_DESCRIPTION = "mlflow.note.content", 8000  # MLflow's limit for a tag


def begin(config: RunConfig, data: Mapping[str, Split]) -> Tracker:
    """The open tracker, with every setting that two runs can differ in and the digests of the data."""
    tracker = open_parent(config.folder, config.tracking, config.name, _provenance(config, data))
    tracker.params(settings_of(config))
    for role, split in data.items():
        for name, digest in split.digests.items():
            tracker.dataset(name, name, digest, role)
    return tracker


def remove(config: RunConfig) -> None:
    """Empties the run's folder. What it recorded stays in `earlier`."""
    for number, part in enumerate(["", *parts_of(config)]):
        keep_earlier(config.folder, config.tracking, part, new=number == 0)
    for path in config.folder.glob("*"):
        if path.name in KEPT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def settings_of(config: RunConfig) -> dict[str, Any]:
    """All but where things lie, and without the sections of stages that are not in the pipeline."""
    left_out = {*OF_NO_RESULT, *STAGES} - {*config.pipeline}
    return {key: value for key, value in public(config).items() if key not in left_out}


def fail(config: RunConfig, tracker: Tracker, error: BaseException) -> None:
    """Ends the run and those of its stages that are still open: their workers went with the cluster."""
    reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    for part in parts_of(config):
        mark_ended(config.folder / part, "KILLED", f"ended with the whole run: {reason}")
    tracker.close(status_of(error), reason)
    catch_up(config.folder, config.tracking)


def finish(config: RunConfig, tracker: Tracker, result: Mapping[str, Any]) -> None:
    """Ends the run with its headline metrics, its curves, the report as its description, and responses that MLflow's view
    of tables sets beside those of other runs.
    """
    tracker.rewind(NOTHING)  # a run whose stages were all complete records the same again
    tracker.metrics(report.headline(result), step=0)
    for line in report.curves(config.folder, result):
        tracker.metrics(line, int(line["step"]))
    tracker.tags({DESCRIPTION: described(report.markdown(result, {}, []))})
    if rows := responses_of(config):
        tracker.table(RESPONSES, rows)
    for path in (*config.folder.glob("report.*"), *sorted((config.folder / "plots").glob("*.png"))):
        tracker.artifact(path)
    tracker.close()


def responses_of(config: RunConfig) -> list[Mapping[str, Any]]:
    """To held-out prompts, as PPO's artifact has them; the final policy's first, because MLflow shows that column."""
    if "ppo" not in config.pipeline:
        return []
    samples = artifacts.load(config.folder / "ppo" / "artifact").metrics.get("samples", [])
    return [{"prompt": sample["prompt"], "ppo": sample["ppo"], **sample} for sample in samples]


def described(text: str) -> str:
    """The whole lines of `text` that fit into a description."""
    if len(text) <= LONGEST_DESCRIPTION:
        return text
    rest = "\n\nThe rest is in the artifact `report.md`.\n"
    return text[: LONGEST_DESCRIPTION - len(rest)].rpartition("\n")[0] + rest


def _provenance(config: RunConfig, data: Mapping[str, Split]) -> str:
    def of(part: str) -> list[Any]:
        roles = stage_of(part).roles
        sources = provenance.parents({role: data[role] for role in roles}, {})
        return [provenance.settings_digest(config, part, roles), sources]

    return digest_of({part: of(part) for part in parts_of(config)})
