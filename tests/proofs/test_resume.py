"""A run that was killed goes on as if nothing had happened: later metrics and every file of the artifact are the same.

In short: a process kills itself at a chosen call. The long form kills two ranks under ZeRO-3 at random moments.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import Trainer

from launch import pipeline
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.distributed.engine import LocalEngine
from rlhf.generation import InProcessSampler
from rlhf.runs import artifacts, checkpoint
from rlhf.tracking import fill_in
from stages import trl_trainer

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests/smoke.yaml"
STAGES = ("sft", "reward/helpfulness", "ppo")
SMALL = [
    *("--model.tiny.hidden_size", "16", "--model.tiny.intermediate_size", "32", "--model.tiny.layers", "1"),
    *("--sft.packing", "false", "--sft.epochs", "1", "--sft.batch_size", "8", "--sft.checkpoints", "7"),
    *("--reward.epochs", "2", "--reward.checkpoints", "7", "--reward.center_rows", "8"),
    *("--ppo.safety_model", "helpfulness", "--ppo.iterations", "4", "--ppo.epochs", "2"),
]

KINDS = {
    "gae": [],
    "grpo": [
        *("--ppo.advantage", "grpo", "--ppo.group_size", "4", "--ppo.sampling.one_step_off_policy", "true"),
        *("--ppo.rewards", f"{{length: {{function: '{__file__}:fails_for_some'}}, model: {{model: helpfulness}}}}"),
    ],
}

pytestmark = pytest.mark.integration


def fails_for_some(responses: list[str]) -> list[float | None]:
    return [None if len(response) % 5 == 0 else len(response) / 10 for response in responses]


def settings(runs_dir: Path, *overrides: str) -> RunConfig:
    return load(SMOKE, ["--runs_dir", str(runs_dir), *SMALL, *overrides])


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, without what measures time. Lines that hold nothing else are not made again: one is
    lost where the kill comes between the checkpoint and it."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = ({k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines)
    return [line for line in kept if line.keys() != {"step"}]


def assert_same(config: RunConfig, whole: RunConfig, stage: str) -> None:
    """The digest of an artifact is over the bytes of all its files."""
    ours, theirs = (artifacts.load(each.folder / stage / "artifact", verify=True) for each in (config, whole))
    assert metrics(config.folder / stage) == metrics(whole.folder / stage)
    assert ours.digest == theirs.digest
    assert ours.metrics == theirs.metrics


def beside(whole: RunConfig, folder: Path, stage: str) -> RunConfig:
    """Another run that has what `stage` starts from."""
    config = whole.model_copy(update={"runs_dir": folder})
    config.folder.mkdir(parents=True)
    for needed in ("base", *STAGES[: STAGES.index(stage)]):
        shutil.copytree(whole.folder / needed, config.folder / needed)
    return config


# --- one process, killed at a chosen call -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run that was never killed."""
    config = settings(tmp_path_factory.mktemp("whole"), "--hardware.workers", "1", "--tracking.uri", "null")
    for stage in STAGES:
        run(config, stage)
    return config


@pytest.fixture(scope="module")
def whole_grpo(whole: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Its PPO without a critic, each iteration sampled during the update before it."""
    own = settings(whole.runs_dir, "--hardware.workers", "1", "--tracking.uri", "null", *KINDS["grpo"])
    config = beside(whole, tmp_path_factory.mktemp("grpo"), "ppo").model_copy(update={"ppo": own.ppo})
    run(config, "ppo")
    return config


def run(config: RunConfig, stage: str) -> None:
    kind, _, name = stage.partition("/")
    pipeline.run_stage(config, kind, True, name or None)


def run_and_die(config: RunConfig, stage: str, place: Any, name: str, nth: int, before: Callable[..., None]) -> None:
    """The stage in this process, which kills itself at the nth call of `place.name`."""
    original, calls = getattr(place, name), []

    def fatal(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            before(*given)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(place, name, fatal)
    run(config, stage)


def nothing(*_: Any) -> None:
    """Killed before the call."""


def half_a_file(content: Any, path: Path, *_: Any) -> None:
    """Killed while torch.save was writing."""
    Path(path).write_bytes(b"PK\x03\x04 half of what was to be written")


@pytest.mark.parametrize(
    ("stage", "place", "name", "nth", "before"),
    [
        ("sft", Trainer, "training_step", 31, nothing),  # 16 steps of 4 passes each, a checkpoint every 2 steps
        ("sft", torch, "save", 2, half_a_file),  # the second checkpoint
        ("reward/helpfulness", checkpoint, "write_json", 2, nothing),  # all written, but not sealed
        ("reward/helpfulness", trl_trainer.Reporter, "on_step_end", 3, nothing),  # a step is made, and not recorded
        ("ppo", InProcessSampler, "sample", 7, nothing),  # checks, then an answer and an evaluation per iteration
        ("ppo", LocalEngine, "step", 19, nothing),  # in the third iteration, between policy and critic
        ("ppo", torch, "save", 6, half_a_file),  # the critic of the third checkpoint
    ],
)
def test_a_killed_stage_ends_as_the_one_that_was_not(whole, tmp_path, stage, place, name, nth, before):
    kill_and_compare(whole, tmp_path, stage, place, name, nth, before)


@pytest.mark.parametrize(
    ("place", "name", "nth", "before"),
    [
        (LocalEngine, "step", 10, nothing),  # in the third iteration, while the fourth is sampled
        (torch, "save", 6, half_a_file),  # the responses for the fourth iteration, in the third checkpoint
    ],
)
def test_so_does_grpo_one_step_off_policy(whole_grpo, tmp_path, place, name, nth, before):
    told = {name for line in metrics(whole_grpo.folder / "ppo") for name in line}
    assert "ppo/kl_loss" in told and not any("critic" in name or "value" in name for name in told)
    kill_and_compare(whole_grpo, tmp_path, "ppo", place, name, nth, before)


def kill_and_compare(
    whole: RunConfig, folder: Path, stage: str, place: Any, name: str, nth: int, before: Callable[..., None]
) -> None:
    config = beside(whole, folder, stage)
    die(config, stage, place, name, nth, before)
    run(config, stage)
    assert_same(config, whole, stage)


def die(config: RunConfig, stage: str, place: Any, name: str, nth: int, before: Callable[..., None]) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_and_die, args=(config, stage, place, name, nth, before))
    process.start()
    process.join(timeout=240)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.complete(config.folder / stage / "checkpoints")
    assert not (config.folder / stage / "artifact/manifest.json").exists()


# --- another number of ranks ---------------------------------------------------------------------------------------


def assert_near(config: RunConfig, whole: RunConfig, stage: str) -> None:
    """The same learning curve but for rounding, and the same weights."""
    ours, theirs = metrics(config.folder / stage), metrics(whole.folder / stage)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4), line["step"]
    here, there = (load_file(each.folder / stage / "artifact/model.safetensors") for each in (config, whole))
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, atol=1e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_sft_goes_on_with_two_ranks(whole: RunConfig, tmp_path: Path) -> None:
    assert_two_ranks_go_on(whole, tmp_path, "sft", Trainer, "training_step", 31)


def test_ppo_goes_on_with_two_ranks_and_with_what_was_sampled_ahead(whole_grpo: RunConfig, tmp_path: Path) -> None:
    assert_two_ranks_go_on(whole_grpo, tmp_path, "ppo", LocalEngine, "step", 10)


def assert_two_ranks_go_on(whole: RunConfig, folder: Path, stage: str, place: Any, name: str, nth: int) -> None:
    """Killed as one process at a chosen call; two ranks under ZeRO-3 go on from its checkpoint."""
    config = beside(whole, folder, stage)
    die(config, stage, place, name, nth, nothing)
    assert count_lines(config.folder / stage / "metrics.jsonl") > 1
    assert start(config, stage, "grpo" if stage == "ppo" else "gae").wait(timeout=300) == 0
    assert_near(config, whole, stage)


# --- two ranks, killed at random moments ------------------------------------------------------------------------------

KILLS = 4


def start(config: RunConfig, stage: str, kind: str = "gae") -> subprocess.Popen[bytes]:
    """Two ranks under ZeRO-3, with MLflow."""
    given = {"--runs_dir": config.runs_dir, "--tracking.uri": config.tracking.uri or "null"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "launch.cli", "stage", stage, str(SMOKE), *SMALL, *KINDS[kind]]
    return subprocess.Popen(
        [*command, *(str(word) for pair in given.items() for word in pair)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_at_random(process: subprocess.Popen[bytes], folder: Path, moment: random.Random) -> None:
    """SIGKILL to one rank or to all, some lines of metrics after the start. Nothing where the stage ends before."""
    lines = folder / "metrics.jsonl"
    wanted = count_lines(lines) + moment.randint(0, 8)
    while count_lines(lines) < wanted and process.poll() is None:
        time.sleep(0.02)
    time.sleep(moment.uniform(0, 1.5))
    children = []
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in children if "launch.cli" in " ".join(child.cmdline())]
        everyone = moment.random() < 0.7 or not ranks
        for victim in [psutil.Process(process.pid), *children] if everyone else [moment.choice(ranks)]:
            victim.kill()
    process.wait()
    psutil.wait_procs(children, timeout=60)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "kind"), [*((stage, "gae") for stage in STAGES), ("ppo", "grpo")])
def test_two_ranks_that_are_killed_again_and_again_end_as_those_that_were_not(tmp_path_factory, tmp_path, stage, kind):
    whole = reference(tmp_path_factory, kind)
    config = beside(whole, tmp_path, stage)
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    config = config.model_copy(update={"tracking": tracking})
    moment = random.Random(stage)
    run_ids = set()
    for _ in range(KILLS):
        kill_at_random(start(config, stage, kind), config.folder / stage, moment)
        run_ids |= {json.loads((config.folder / stage / "mlflow.json").read_text())["run_id"]}
    assert start(config, stage, kind).wait() == 0
    assert_same(config, whole, stage)
    assert fill_in(config.folder / stage, config.tracking)
    run_ids |= {json.loads((config.folder / stage / "mlflow.json").read_text())["run_id"]}
    (run_id,) = run_ids - {None}
    client = MlflowClient(config.tracking.uri)
    lines = metrics(config.folder / stage)
    for name in {name for line in lines for name in line} - {"step"}:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        history = [(p.step, p.value) for p in client.get_metric_history(run_id, name) if p.value == p.value]
        assert sorted(history) == points, name


REFERENCE: dict[str, RunConfig] = {}


def reference(tmp_path_factory: pytest.TempPathFactory, kind: str) -> RunConfig:
    """The three stages on two ranks, never killed; made once."""
    if kind not in REFERENCE:
        config = settings(tmp_path_factory.mktemp("reference"), "--tracking.uri", "null", *KINDS[kind])
        for stage in STAGES:
            assert start(config, stage, kind).wait() == 0
        REFERENCE[kind] = config
    return REFERENCE[kind]
