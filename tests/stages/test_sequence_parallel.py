"""SFT and a reward model whose sequences are divided over two ranks end as those of one process.

The file is also the program of each rank: `test_sequence_parallel.py FOLDER`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import pipeline
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.tracking import read_metrics
from tests.worker_group import leave, run_ranks

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
SHIPPED = "{train: [{path: shipped, limit: 32}], held_out: [{path: shipped, split: held_out, limit: 5}]}"
SMALL = [
    *("--tracking.uri", "null", "--data.demonstrations", SHIPPED, "--data.preferences", SHIPPED),
    *("--sft", "{epochs: 1, batch_size: 8, micro_batch_size: 2, max_length: 256, optim: {lr: 5e-3}}"),
    *(
        "--reward",
        "{epochs: 2, batch_size: 4, micro_batch_size: 2, max_length: 256, center_rows: 5, optim: {lr: 1e-3}}",
    ),
]
PACKED = ["--sft.packing", "true", "--sft.batch_size", "2", "--sft.micro_batch_size", "1"]
RUNS = {
    "padded": ("sft", ["--sft.packing", "false"]),
    "packed": ("sft", [*PACKED, "--model.gradient_checkpointing", "true"]),
    "pairs": ("reward/safety", []),
}
KIND = pytest.mark.parametrize("kind", RUNS)


def settings(folder: Path, kind: str, ranks: int) -> RunConfig:
    hardware = f"{{workers: {ranks}, workers_per_reward_model: null, sequence_parallel: {ranks}}}"
    return load(SMOKE, ["--runs_dir", str(folder / kind), "--hardware", hardware, *SMALL, *RUNS[kind][1]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, RunConfig]]:
    """number of ranks → kind → the finished run."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks-{ranks}") for ranks in (1, 2)}
    for kind, (stage, _) in RUNS.items():
        alone, together = (settings(folders[ranks], kind, ranks).folder for ranks in (1, 2))
        name, _, part = stage.partition("/")
        if name == "reward":  # starts from the same SFT model
            for folder in (alone, together):
                for given in ("base", "sft"):
                    shutil.copytree(settings(folders[1], "padded", 1).folder / given, folder / given)
        pipeline.run_stage(settings(folders[1], kind, 1), name, True, part or None)
        shutil.copytree(alone / "base", together / "base", dirs_exist_ok=True)
    run_ranks(__file__, folders[2], ranks=2, timeout=300)
    return {ranks: {kind: settings(folder, kind, ranks) for kind in RUNS} for ranks, folder in folders.items()}


@KIND
def test_weights_end_as_those_of_one_process(runs, kind):
    stage = RUNS[kind][0]
    here, there = (load_file(runs[n][kind].folder / stage / "artifact/model.safetensors") for n in (2, 1))
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, atol=5e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@KIND
def test_they_moved_more_than_the_tolerance(runs, kind):
    stage = RUNS[kind][0]
    before = runs[1][kind].folder / ("base" if stage == "sft" else "sft/artifact") / "model.safetensors"
    start, end = load_file(before), load_file(runs[1][kind].folder / stage / "artifact/model.safetensors")
    moved = [(end[name] - tensor).abs().max() for name, tensor in start.items() if name in end]
    assert len(moved) > 10 and min(moved) > 1e-3


@KIND
def test_losses_and_held_out_metrics_are_those_of_one_process(runs, kind):
    stage = RUNS[kind][0]
    here, there = (read_metrics(runs[n][kind].folder / stage) for n in (2, 1))
    for name in (name for name in there if not name.startswith("perf/")):
        assert here[name] == [(step, pytest.approx(value, rel=1e-4, abs=1e-5)) for step, value in there[name]], name
    assert len(there["sft/loss" if stage == "sft" else "reward/loss"]) >= 3


def main(folder: Path) -> None:
    from launch.worker import run_rank, torchrun_group

    with torchrun_group(settings(folder, "padded", 2)):
        for kind, (stage, _) in RUNS.items():
            run_rank(settings(folder, kind, 2), stage, local=False)
        leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
