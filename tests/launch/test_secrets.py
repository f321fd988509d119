"""A password in an address stays out of all that is shown and stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import cli
from launch.settings import load
from launch.worker import read_failure
from rlhf.runs import provenance
from rlhf.runs.artifacts import digest_of
from stages.base import stage_of

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
SECRET = "tok3n"
PLACE = "ann:tok3n@127.0.0.1:1"  # nothing listens there
URI = ["--tracking.uri", f"http://{PLACE}"]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a stage leaves behind, and what it shows, where MLflow cannot be reached and data cannot be used."""
    folder = tmp_path_factory.mktemp("run")
    shown = pytest.MonkeyPatch()
    said: list[str] = []
    with shown.context() as patch:
        patch.setattr("rlhf.tracking.mlflow_sync.log.warning", lambda text, *args: said.append(text % args))
        patch.setattr("rlhf.tracking.mlflow_sync.CLOSE_LIMIT_S", 40.0)
        arguments = [*URI, "--runs_dir", str(folder), "--sft.max_length", "3"]
        assert cli.main(["stage", "sft", str(SMOKE), "--local", *arguments]) == 3
    return folder / "smoke/sft", "\n".join(said)


@pytest.mark.integration
def test_no_file_of_a_stage_and_no_warning_holds_it(left: tuple[Path, str]) -> None:
    folder, shown = left
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "events.jsonl", "failure.json", "mlflow.json"} <= {path.name for path in files}
    assert [path.name for path in files if SECRET in path.read_text(errors="replace")] == []
    assert "127.0.0.1:1" in shown and SECRET not in shown


def test_settings_are_shown_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(SMOKE), *URI, "--hardware.ray_address", f"ray://{PLACE}"]) == 0
    out = capsys.readouterr().out
    assert "uri: http://127.0.0.1:1" in out and "ray_address: ray://127.0.0.1:1" in out
    assert SECRET not in out


def test_a_mistake_is_told_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(SMOKE), "--seed", f"http://{PLACE}"]) == 2
    assert "127.0.0.1" in (err := capsys.readouterr().err) and SECRET not in err


def test_a_fault_of_the_program_is_told_and_kept_without_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))

    def fail() -> int:
        raise RuntimeError(f"no answer from http://{PLACE}")

    assert cli._guarded(fail) == 1
    assert SECRET not in capsys.readouterr().err
    assert [SECRET in path.read_text() for path in tmp_path.iterdir()] == [False]


def test_the_worker_that_fails_notes_the_reason_without_it(tmp_path: Path) -> None:
    from launch import worker

    config = load(SMOKE, ["--runs_dir", str(tmp_path)])
    worker.note_failure(config, "sft", RuntimeError(f"no answer from http://{PLACE}"))
    failure = read_failure(config.folder / "sft")
    assert failure is not None and "127.0.0.1" in failure.message
    assert [p for p in tmp_path.rglob("*") if p.is_file() and SECRET in p.read_text()] == []


def test_it_is_still_used_and_makes_no_artifact_stale() -> None:
    plain, secret = load(SMOKE, []), load(SMOKE, URI)
    assert secret.tracking.uri == f"http://{PLACE}"
    for stage in ("sft", "reward/safety", "ppo"):
        settings = (provenance.stage_settings(config, stage, stage_of(stage).roles) for config in (plain, secret))
        assert len({digest_of(of_stage) for of_stage in settings}) == 1
