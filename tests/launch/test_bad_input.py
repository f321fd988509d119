"""Bad input through the command line: one clear message, its exit code, nothing started and nothing left that looks whole."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import cli, parent_run, worker_group

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
ROW = {"messages": [{"role": "user", "content": "what is 2 + 3?"}, {"role": "assistant", "content": "5"}]}
PAIR = {"prompt": "what is 2 + 3?", "chosen": "5", "rejected": "6"}

Refused = Callable[..., str]


@pytest.fixture
def refused(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """refused(code, *arguments) runs the pipeline, which must end with `code` before any process → its message."""

    def fail(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(worker_group, "cluster", fail)
    monkeypatch.setattr(parent_run, "begin", fail)

    def run(code: int, *arguments: str) -> str:
        got = cli.main(["run", str(SMOKE), "--tracking.uri", "null", "--hardware", "{workers: 1}", *arguments])
        shown = capsys.readouterr()
        assert (got, shown.out) == (code, "")
        assert shown.err.startswith("error: ") and shown.err.count("error: ") == 1
        assert "Traceback" not in shown.err and "traceback" not in shown.err
        assert list(runs_dir.iterdir()) == []
        return shown.err

    return run


def role(name: str, file: str) -> list[str]:
    return [f"--data.{name}", f"{{train: [{{path: {file}}}]}}"]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- settings -------------------------------------------------------------------------------------------------------


def test_an_unknown_key(refused: Refused) -> None:
    message = refused(2, "--ppo.clipp", "0.1")
    assert "ppo.clipp: unknown setting (did you mean ppo.clip_range?)" in message


# --- data -----------------------------------------------------------------------------------------------------------


def test_a_missing_file(refused: Refused, tmp_path: Path) -> None:
    message = refused(3, *role("prompts", "none.jsonl"))
    assert "data.prompts.train.0.path: there is no file or folder" in message
    assert "none.jsonl" in message


def test_a_git_lfs_pointer_instead_of_data(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "pairs.jsonl: a Git LFS pointer, not the data itself; fetch the data with `git lfs pull`" in refused(
        3, *role("preferences", "pairs.jsonl")
    )


def test_a_binary_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(bytes(range(256)))
    assert "is this a binary file?" in refused(3, *role("prompts", "rows.jsonl"))


def test_a_row_with_a_number_for_text(refused: Refused, tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "what is 2 + 3?"}, {"role": "assistant", "content": 5}]}
    write_rows(tmp_path / "rows.jsonl", [ROW, ROW, bad])
    message = refused(3, *role("demonstrations", "rows.jsonl"))
    assert "rows.jsonl:3" in message
    assert "text" in message and "number" in message


def test_an_empty_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    assert "pairs.jsonl: the file is empty" in refused(3, *role("preferences", "pairs.jsonl"))


def test_preferences_without_the_tag_of_a_reward_model(refused: Refused, tmp_path: Path) -> None:
    """Said before SFT, and not when the safety model has its turn."""
    write_rows(tmp_path / "pairs.jsonl", [PAIR | {"prompt": f"what is {n} + 3?"} for n in range(80)])
    assert "no preference is tagged 'safety'" in refused(3, *role("preferences", "pairs.jsonl"))


def test_no_held_out_prompts_for_the_report(refused: Refused) -> None:
    assert "ppo.eval_prompts is 32, but only 32 prompts are held out" in refused(3, "--ppo.eval_prompts", "32")


# --- model ----------------------------------------------------------------------------------------------------------


def test_a_wrong_model_path(refused: Refused) -> None:
    message = refused(4, "--model.path", "./models/llama")
    assert "model.path: there is no folder" in message and "models/llama" in message


def test_a_model_folder_without_weights(runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the stage that loads it can tell."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    own = ["--tracking.uri", "null", "--hardware.workers", "1", "--model.path", "model"]
    assert cli.main(["stage", "sft", str(SMOKE), "--local", *own]) == 4
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and "cannot" in message and str(tmp_path / "model") in message
    assert "Traceback" not in message
    assert list(runs_dir.rglob("manifest.json")) == []


# --- machine --------------------------------------------------------------------------------------------------------


def test_too_few_processors_for_the_worker_group(refused: Refused) -> None:
    message = refused(5, "--hardware", "{workers: 2, cpus_per_worker: 4096}")
    assert "needs 2 workers × 4096 CPUs = 8192, this machine has" in message
    assert "lower hardware.workers or hardware.cpus_per_worker" in message


def test_no_disk_space(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    message = refused(5)
    assert "are needed in" in message and "0.0 GB are free" in message
    assert "free some space, or set runs_dir to another disk" in message
