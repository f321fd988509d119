from __future__ import annotations

import errno
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch import cli
from reward_data import DataError
from rlhf.errors import UserError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "mlflow", "transformers", "pydantic", "yaml", "rich", "numpy")


def main(*argv: str) -> int:
    return cli.main(argv)


# --- help


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["score", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = f"""
import sys
from launch import cli
try:
    cli.main({argv!r})
except SystemExit as end:
    assert end.code == 0
found = [name for name in {HEAVY!r} if name in sys.modules]
print("HEAVY", found)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in ("run", "stage", "score", "chat", "import-gguf", "config", "report"):
        assert f"\n    {name}" in shown


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["rum"],
        ["stage", "distill", "quickstart"],
        ["stage", "sft/x", "quickstart"],
        ["score", "model", "file"],
        ["score", "model", "file", "--out", "x", "--batch-size", "0"],
        ["score", "model", "file", "--out", "x", "--seed", "1"],
        ["chat", "model", "--temperature", "-1"],
        ["chat", "model", "--temperature", "warm"],
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(*argv)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


# --- what reaches the pipeline


class Pipeline(types.ModuleType):
    """Stands in for launch.pipeline and notes what it is asked to do."""

    def __init__(self, outcome: Callable[[], int] = lambda: 0) -> None:
        super().__init__("launch.pipeline")
        self.calls: list[tuple] = []
        self._outcome = outcome

    def run(self, config, fresh):
        self.calls.append((config.seed, config.ppo.optim.lr, fresh))
        return self._outcome()

    def run_stage(self, config, stage, local, name):
        self.calls.append((config.seed, stage, local, name))
        return self._outcome()


def put_in_place(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> Pipeline:
    import launch

    monkeypatch.setitem(sys.modules, "launch.pipeline", pipeline)
    monkeypatch.setattr(launch, "pipeline", pipeline, raising=False)
    return pipeline


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    monkeypatch.chdir(tmp_path)
    return put_in_place(monkeypatch, Pipeline())


ONE_WORKER = ["--hardware.workers", "1"]


def test_run_takes_settings_and_its_own_option_in_any_order(pipeline: Pipeline) -> None:
    assert main("run", "quickstart", "--seed", "3", "--fresh", "--ppo.optim.lr=1e-6", *ONE_WORKER) == 0
    assert main("run", "--fresh", "quickstart", *ONE_WORKER, "--seed=-3", "--ppo.optim.lr", "0") == 0
    assert main("run", "quickstart", *ONE_WORKER, "--seed", "-1", "--ppo.optim.lr", "1") == 0
    assert pipeline.calls == [(3, 1e-6, True), (-3, 0.0, True), (-1, 1.0, False)]


@pytest.mark.parametrize(
    ("argv", "call"),
    [
        (["sft", "quickstart"], (0, "sft", False, None)),
        (["reward", "quickstart", "--local"], (0, "reward", True, None)),
        (["reward/safety", "quickstart", "--seed", "2"], (2, "reward", False, "safety")),
    ],
)
def test_stage_names_its_stage(pipeline: Pipeline, argv: list[str], call: tuple) -> None:
    assert main("stage", *argv, *ONE_WORKER) == 0
    assert pipeline.calls == [call]


def test_a_reward_model_that_the_run_has_not_is_refused(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("stage", "reward/harm", "quickstart") == 2
    shown = capsys.readouterr().err
    assert "this run has no reward/harm: pipeline has sft, reward, ppo, which makes sft, reward/helpfulness" in shown
    assert pipeline.calls == []


def test_mistakes_in_settings_stop_before_anything_starts(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("run", "quickstart", "--ppo.optm.lr", "1", "--frsh") == 2
    shown = capsys.readouterr().err
    assert "ppo.optm: unknown setting (did you mean ppo.optim?)" in shown
    assert "frsh: has no value" in shown
    assert pipeline.calls == []


def test_a_setting_before_the_run_file_is_explained(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("run", "--seed", "3", "quickstart") == 2
    assert "give it before the settings" in capsys.readouterr().err


def test_a_machine_that_is_too_small_stops_a_run_but_not_a_local_stage(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["--hardware", "{workers: 32, cpus_per_worker: 64}"]
    assert main("run", "quickstart", *many) == 5
    assert "needs 32 workers × 64 CPUs = 2048" in capsys.readouterr().err
    assert main("stage", "sft", "quickstart", "--local", *many) == 0
    assert pipeline.calls == [(0, "sft", True, None)]


# --- errors


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no disk space", 5), 5, "no disk space"),
        (UserError("wrong key"), 2, "wrong key"),
        (DataError("rows.jsonl:3: no text"), 3, "rows.jsonl:3: no text"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 5, "the disk is full: runs/x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_a_message_and_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.chdir(tmp_path)
    put_in_place(monkeypatch, Pipeline(fail))
    assert main("run", "quickstart", *ONE_WORKER) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"error: {message}")


def test_a_fault_of_the_program_leaves_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise KeyError("surprise")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    put_in_place(monkeypatch, Pipeline(fail))
    assert main("run", "quickstart", *ONE_WORKER) == 1
    shown = capsys.readouterr().err
    assert "unexpected KeyError: 'surprise'" in shown
    assert "Traceback (most" not in shown
    (kept,) = tmp_path.glob("rlhf-*.traceback.txt")
    assert str(kept) in shown
    assert "Traceback (most recent call last)" in kept.read_text()


def test_debugging_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_DEBUG", "1")
    monkeypatch.chdir(tmp_path)
    assert main("config", "nothing") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_exit_code_of_the_pipeline_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    put_in_place(monkeypatch, Pipeline(lambda: 6))
    assert main("run", "quickstart", *ONE_WORKER) == 6


# --- the small commands


def test_a_thread_that_still_computes_aborts_no_process(tmp_path: Path) -> None:
    """An ordinary exit would: the thread asks for Python's lock in C++ code when the interpreter is gone."""
    script = """
import atexit, threading, torch
from launch import cli

def compute():
    while True:
        torch.ones(300, 300) @ torch.ones(300, 300)

threading.Thread(target=compute, daemon=True).start()
atexit.register(print, "cleaned up")
cli.main = lambda: 3
cli.command_line()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "cleaned up\n", "")


def test_config_prints_settings_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("config", "quickstart", "--ppo.optim.lr", "1e-6") == 0
    assert yaml.safe_load(capsys.readouterr().out)["ppo"]["optim"]["lr"] == 1e-6


def test_a_reader_that_stops_reading_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "launch.cli", "config", "quickstart"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_report_shows_the_report_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.md").write_text("# Report\n")
    assert main("report", str(tmp_path)) == 0
    assert capsys.readouterr().out == "# Report\n"
    assert main("report", str(tmp_path / "other")) == 4
