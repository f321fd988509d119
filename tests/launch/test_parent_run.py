"""The run by which people compare: it carries what two runs can differ in, and says how it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import parent_run
from launch.report import section_of
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.data import Split
from rlhf.errors import UserError
from rlhf.runs import artifacts
from rlhf.tracking import open_tracker

SMOKE = Path(__file__).parents[1] / "smoke.yaml"


def config_in(folder: Path, *overrides: str) -> RunConfig:
    return load(SMOKE, ["--runs_dir", str(folder), "--tracking.uri", "null", *overrides])


def data_of(digest: str) -> dict[str, Split]:
    return {role: Split([], [], {"file": digest}, []) for role in ("demonstrations", "preferences", "prompts")}


def events(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def run(config: RunConfig, digest: str = "a") -> None:
    parent_run.begin(config, data_of(digest)).close()


def test_a_run_has_every_setting_but_where_things_lie(tmp_path: Path) -> None:
    settings = parent_run.settings_of(config_in(tmp_path, "--ppo.kl_coef", "0.3"))
    left_out = {"name", "runs_dir", "tracking"}
    assert settings["ppo"]["kl_coef"] == 0.3
    assert settings.keys() == RunConfig.model_fields.keys() - left_out - {"dpo"}


def test_stages_that_are_not_made_have_no_settings(tmp_path: Path) -> None:
    settings = parent_run.settings_of(config_in(tmp_path, "--pipeline", "[sft]"))
    assert "sft" in settings and not {"reward", "ppo"} & settings.keys()


def test_data_are_named_with_role_and_digest(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run(config, "0123")
    named = {(entry["role"], entry["name"], entry["digest"]) for entry in events(config.folder, "dataset")}
    assert named == {(role, "file", "0123") for role in ("demonstrations", "preferences", "prompts")}


@pytest.mark.parametrize(
    ("change", "digest", "is_new"),
    [
        ([], "a", False),
        (["--hardware.max_restarts", "0"], "a", False),
        (["--ppo.kl_coef", "0.3"], "a", True),
        ([], "b", True),
    ],
)
def test_other_settings_or_data_make_another_run(tmp_path: Path, change: list[str], digest: str, is_new: bool) -> None:
    run(config_in(tmp_path))
    second = config_in(tmp_path, *change)
    run(second, digest)
    assert (second.folder / "earlier/1/events.jsonl").exists() == is_new
    assert len(events(second.folder, "params")) == (1 if is_new else 2)


def test_a_run_that_starts_over_keeps_what_it_recorded_and_nothing_else(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run(config)
    open_tracker(config.folder / "reward/safety", config.tracking, "reward/safety", "", is_writer=True).close()
    (config.folder / "report.json").write_text("{}")
    (config.folder / "sft/artifact").mkdir(parents=True)
    parent_run.remove(config)
    left = {path.relative_to(config.folder).as_posix() for path in config.folder.rglob("*") if path.is_file()}
    recorded = {"metrics.jsonl", "events.jsonl", "mlflow.json", "git.diff"}
    assert left <= {f"earlier/1/{part}{name}" for name in recorded for part in ("", "reward/safety/")}
    assert {"earlier/1/events.jsonl", "earlier/1/reward/safety/events.jsonl"} <= left


def test_nothing_is_kept_of_a_run_that_was_not_there(tmp_path: Path) -> None:
    parent_run.remove(config_in(tmp_path))
    assert list(tmp_path.rglob("*")) == []


def test_a_failed_run_closes_the_stages_that_went_with_it(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    tracker = parent_run.begin(config, data_of("a"))
    for stage, ended in (("sft", True), ("reward/safety", False)):
        one = open_tracker(config.folder / stage, config.tracking, stage, "", is_writer=True)
        if ended:
            one.close()
    parent_run.fail(config, tracker, UserError("reward/helpfulness failed: no memory"))

    def last(stage: str) -> tuple[str, str]:
        event = events(config.folder / stage, "status")[-1]
        return event["status"], event["reason"]

    assert last("") == ("FAILED", "reward/helpfulness failed: no memory")
    assert last("sft") == ("FINISHED", "")
    assert last("reward/safety") == ("KILLED", "ended with the whole run: reward/helpfulness failed: no memory")


def test_an_interrupted_run_was_killed(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    parent_run.fail(config, parent_run.begin(config, data_of("a")), KeyboardInterrupt())
    assert events(config.folder, "status")[-1]["status"] == "KILLED"


def test_a_long_description_ends_with_a_whole_line_and_says_where_the_rest_is() -> None:
    text = "".join(f"line {number:04}\n" for number in range(2000))
    cut = parent_run.described(text)
    shown, _, rest = cut.partition("\n\n")
    assert 7900 < len(cut) <= 8000
    assert all(len(line) == 9 for line in shown.splitlines()) and "report.md" in rest
    assert parent_run.described("short\n") == "short\n"


def test_the_parent_has_the_responses_to_held_out_prompts_once(tmp_path: Path) -> None:
    """Also where a run that is complete is repeated."""
    config, rows = config_in(tmp_path), [{"prompt": "p", "sft": "before", "ppo": "after"}]
    (artifacts.begin(config.folder / "ppo/artifact") / "model.safetensors").write_text("")
    artifacts.complete(config.folder / "ppo/artifact", "ppo", {}, "", {"samples": rows})
    result = {"run": config.name, "mlflow": {"run_id": None, "tracking_uri": None}, "artifacts": {}, "seconds": {}}
    for _ in range(2):
        parent_run.finish(config, parent_run.begin(config, data_of("a")), result)
    (table,) = events(config.folder, "table")
    assert table["name"] == "held_out_answers" and table["rows"] == rows
    assert list(table["rows"][0]) == ["prompt", "ppo", "sft"]


def test_the_parent_has_the_curves_of_dpo(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    tracker = open_tracker(config.folder / "dpo", config.tracking, "dpo", "", is_writer=True)
    for step in (1, 2):
        tracker.metrics({"dpo/loss": 1.0 / step, "perf/seconds": 3.0}, step)
    tracker.close()
    lines = section_of("dpo").curves(config.folder)
    assert [{key: line[key] for key in line if key != "time"} for line in lines] == [
        {"step": 1, "dpo/loss": 1.0},
        {"step": 2, "dpo/loss": 0.5},
    ]
    assert list(section_of("dpo").curves(tmp_path / "none")) == []
