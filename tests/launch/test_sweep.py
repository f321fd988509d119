"""`rlhf sweep`: its grid, which stages are made and shared, what a failed cell stops, and the comparison at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from scipy import stats

from launch import pipeline, worker_group
from launch.settings import load
from launch.sweep.grid import cell_name, plan, split
from launch.sweep.sweep import sweep
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.tracking import Tracker, recorded
from rlhf.tracking.jsonl import read_lines
from tests.launch.fake_worker_group import STAGES, commit, few_shipped_rows, no_cluster

SMOKE = str(Path(__file__).parents[2] / "tests/smoke.yaml")
KL = ("--ppo.kl_coef", "0.01", "0.05")
CELLS = [f"kl_coef-{kl}-seed-{seed}" for kl in ("0_01", "0_05") for seed in (0, 1)]
COMPARISON = "smoke-sweep/comparison/report.json"
GOLD = {0.01: [0.50, 0.56, 0.53], 0.05: [0.61, 0.65, 0.60], 0.2: [0.4, 0.4, 0.4]}  # kl_coef → by seed


class Group:
    """A worker group that is done at the second look."""

    started: ClassVar[list[str]]  # cell/stage
    running: ClassVar[list[str]]
    busy: ClassVar[list[int]]  # workers, whenever a stage starts
    meets: ClassVar[dict[str, BaseException]]  # cell/stage → what befalls it

    def __init__(self, config: RunConfig, stage: str, workers: int) -> None:
        self.name, self.config, self.stage, self.looks = f"{config.name}/{stage}", config, stage, 0
        self.started.append(self.name)
        self.running.extend([self.name] * workers)
        self.busy.append(len(self.running))

        self.news: list[str] = []
        self.restarts = 0

    def waits_for(self) -> str:
        return ""

    def done(self, timeout_s: float) -> bool:
        self.looks += 1
        return self.looks == 2

    def result(self) -> None:
        self.running[:] = [name for name in self.running if name != self.name]
        if self.name in self.meets:
            raise self.meets[self.name]
        (self.config.folder / self.stage / "metrics.jsonl").write_text(json.dumps({"step": 1, "sft/loss": 2.0}) + "\n")
        commit(self.config, self.stage)


def fake_report(config: RunConfig, tracker: Tracker, seconds: Mapping[str, float]) -> dict[str, Any]:
    value = GOLD[config.ppo.kl_coef][config.seed]
    report = {"ppo": {"held_out": {p: {"gold": {"value": value}} for p in ("base", "sft", "ppo")}}}
    (config.folder / "report.json").write_text(json.dumps(report))
    tracker.close()
    return report


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("started", "running", "busy"):
        monkeypatch.setattr(Group, name, [], raising=False)
    monkeypatch.setattr(Group, "meets", {}, raising=False)
    monkeypatch.setattr(worker_group, "cluster", no_cluster)
    monkeypatch.setattr(worker_group, "WorkerGroup", Group)
    monkeypatch.setattr(worker_group, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    monkeypatch.setattr(pipeline, "write_report", fake_report)


@pytest.fixture(scope="module", autouse=True)
def few_rows(tmp_path_factory: pytest.TempPathFactory):
    with few_shipped_rows(tmp_path_factory.mktemp("shipped")):
        yield


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """run(*overrides) → the stages that a sweep of the smoke run started."""

    def start(*overrides: str, seeds: int = 2) -> list[str]:
        Group.started.clear()
        own = ["--runs_dir", str(tmp_path), "--tracking.uri", "null", "--hardware.workers", "1"]
        assert sweep(SMOKE, [*own, *overrides], seeds) == 0
        return list(Group.started)

    return start


def folder_of(cell: str, tmp_path: Path) -> Path:
    return tmp_path / "smoke-sweep" / cell


# --- the grid -------------------------------------------------------------------------------------------------------


def test_a_setting_with_several_values_is_an_axis_and_the_others_are_settings() -> None:
    given = ["--a.b", "1", "--c", "2", "-3", "--d=4", "--e.f", "x", "y", "z"]
    assert split(given) == (["--a.b", "1", "--d=4"], {"c": ["2", "-3"], "e.f": ["x", "y", "z"]})


def test_every_combination_is_a_cell_with_its_settings(tmp_path: Path) -> None:
    planned = plan(SMOKE, ["--runs_dir", str(tmp_path), *KL, "--ppo.gae_lambda", "0.9", "1.0", "--seed", "5"], 2)
    found = [(cell.ppo.kl_coef, cell.ppo.gae_lambda, cell.seed) for cell in planned.cells]
    assert found == [(kl, lam, seed) for kl in (0.01, 0.05) for lam in (0.9, 1.0) for seed in (5, 6)]
    assert planned.cells[0].folder == tmp_path / "smoke-sweep" / "kl_coef-0_01-gae_lambda-0_9-seed-5"


@pytest.mark.parametrize(
    ("combination", "name"),
    [
        ({"ppo.kl_coef": "1e-3"}, "kl_coef-1e-3"),
        ({"ppo.optim.lr": "1e-6", "ppo.critic_optim.lr": "2e-6"}, "ppo_optim_lr-1e-6-ppo_critic_optim_lr-2e-6"),
        ({"ppo.rewards.x.function": "my/file.py:f"}, "function-my_file_py_f-[0-9a-f]{8}"),
    ],
)
def test_the_name_of_a_cell_can_be_a_folder(combination: dict[str, str], name: str) -> None:
    assert re.fullmatch(name, cell_name(combination))


@pytest.mark.parametrize(
    ("overrides", "seeds", "message"),
    [
        (["--ppo.kl_coef", "0.01"], 1, "needs several values"),
        (["--seed", "0", "1"], 2, "--seed with several values and --seeds"),
        (["--tracking.uri", "a", "b"], 1, "--tracking.uri has 2 values, but it is the same for all cells"),
        (["--ppo.kl_coef", "0.01", "0.01"], 1, "has the value 0.01 twice"),
        (["--ppo.kl_coef", "1", "2", "--ppo.kl_coef", "3", "4"], 1, "is given twice"),
        (["--ppo.kl_coef", "0.01", "-1"], 1, "ppo.kl_coef: "),
        (["--ppo.kl_cof", "0.01", "1"], 1, "unknown setting .did you mean ppo.kl_coef"),
    ],
)
def test_what_is_no_grid_is_refused_before_anything_starts(
    run: Callable[..., list[str]], tmp_path: Path, overrides: list[str], seeds: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(*overrides, seeds=seeds)
    assert caught.value.exit_code == 2
    assert [*tmp_path.iterdir()] == [] and Group.started == []


# --- stages ---------------------------------------------------------------------------------------------------------


def test_equal_stages_are_made_once_and_shared(run: Callable[..., list[str]], tmp_path: Path) -> None:
    started = run(*KL)
    assert sorted(started) == sorted(
        [f"{CELLS[seed]}/{stage}" for seed in (0, 1) for stage in STAGES] + [f"{CELLS[2]}/ppo", f"{CELLS[3]}/ppo"]
    )
    for made, shared in ((CELLS[0], CELLS[2]), (CELLS[1], CELLS[3])):
        for stage in STAGES[:3]:
            ours, theirs = (folder_of(cell, tmp_path) / stage for cell in (made, shared))
            assert (ours / "artifact/model.safetensors").samefile(theirs / "artifact/model.safetensors")
            assert (ours / "metrics.jsonl").read_text() == (theirs / "metrics.jsonl").read_text()
            assert not (ours / "metrics.jsonl").samefile(theirs / "metrics.jsonl")


def test_a_cell_is_an_ordinary_run(run: Callable[..., list[str]], tmp_path: Path) -> None:
    """Nothing is made again, and another setting makes its stage here without touching the other cell."""
    run(*KL)
    Group.started.clear()
    runfile = folder_of(CELLS[2], tmp_path) / "run.yaml"
    other = folder_of(CELLS[0], tmp_path) / "sft/artifact/model.safetensors"
    before = other.read_bytes()
    pipeline_run = pipeline.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_report", lambda *_: None)
        assert pipeline_run(load(runfile, []), False) == 0
        assert Group.started == []
        assert pipeline_run(load(runfile, ["--sft.epochs", "3"]), False) == 0
    assert Group.started == [f"{CELLS[2]}/{stage}" for stage in STAGES]
    assert other.read_bytes() == before


def test_a_stage_after_other_stages_is_another(run: Callable[..., list[str]]) -> None:
    assert len(run("--sft.epochs", "3", "5", seeds=1)) == 2 * len(STAGES)


def test_the_same_command_starts_nothing_and_a_larger_grid_only_what_is_new(
    run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(*KL)
    capsys.readouterr()
    assert run(*KL) == []
    assert capsys.readouterr().out.count("skipped") == 4
    assert run(*KL, "0.2") == [f"kl_coef-0_2-seed-{seed}/ppo" for seed in (0, 1)]


@pytest.mark.parametrize(("workers", "most"), [("1", 2), ("2", 2)])  # of 2 CPUs
def test_as_many_workers_run_as_there_are_processors(run: Callable[..., list[str]], workers: str, most: int) -> None:
    started = run(*KL, "--hardware.workers", workers)
    assert max(Group.busy) == most
    assert len(started) == 10


def test_a_cell_that_fits_no_machine_fails_alone(
    run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from launch.sweep import sweep as module

    monkeypatch.setattr(module, "preflight", lambda config: None)  # on a cluster the machine here says nothing
    with pytest.raises(UserError, match="1 of 2 cells failed: workers-4-seed-0") as caught:
        run("--hardware.workers", "4", "1", "--sft.batch_size", "4", seeds=1)  # in this order nothing is made to share
    assert caught.value.exit_code == 5
    assert (folder_of("workers-1-seed-0", tmp_path) / "report.json").exists()


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failed_cell_stops_no_other_and_is_tried_again(
    run: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Group.meets[f"{CELLS[2]}/ppo"] = RuntimeError("Ray says many things\nand then: the reward is NaN")
    with pytest.raises(UserError, match=f"1 of 4 cells failed: {CELLS[2]}") as caught:
        run(*KL)
    assert caught.value.exit_code == 6
    shown = capsys.readouterr().out
    assert "failed: ppo failed: a worker died: and then: the reward is NaN" in " ".join(shown.split())
    assert [(folder_of(cell, tmp_path) / "report.json").exists() for cell in CELLS] == [True, True, False, True]
    assert status_of(folder_of(CELLS[2], tmp_path)) == "FAILED" == status_of(tmp_path / "smoke-sweep")
    compared = json.loads((tmp_path / COMPARISON).read_text())["runs"]
    assert [one["name"] for one in compared] == [CELLS[0], CELLS[1], CELLS[3]]
    Group.meets.clear()
    assert run(*KL) == [f"{CELLS[2]}/ppo"]
    assert status_of(folder_of(CELLS[2], tmp_path)) == "FINISHED" == status_of(tmp_path / "smoke-sweep")


def test_cells_that_share_a_failed_stage_fail_without_trying_it_again(run: Callable[..., list[str]]) -> None:
    Group.meets[f"{CELLS[1]}/sft"] = RuntimeError("no memory")
    with pytest.raises(UserError, match=f"2 of 4 cells failed: {CELLS[1]}, {CELLS[3]}"):
        run(*KL)
    assert [name for name in Group.started if name.endswith("seed-1/sft")] == [f"{CELLS[1]}/sft"]
    assert {f"{CELLS[0]}/ppo", f"{CELLS[2]}/ppo"} < {*Group.started}


def test_an_interrupted_sweep_says_so_and_goes_on(run: Callable[..., list[str]], tmp_path: Path) -> None:
    Group.meets[f"{CELLS[0]}/reward/safety"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(*KL)
    assert status_of(folder_of(CELLS[0], tmp_path)) == "KILLED" == status_of(tmp_path / "smoke-sweep")
    made = {*Group.started} - {f"{CELLS[0]}/reward/safety"} - {*Group.running}
    Group.meets.clear()
    Group.running.clear()
    assert not made & {*run(*KL)}


def status_of(folder: Path) -> str:
    return [event["status"] for event, _ in read_lines(folder / "events.jsonl") if event["event"] == "status"][-1]


# --- comparison -----------------------------------------------------------------------------------------------------


def test_the_comparison_pairs_the_cells_over_seeds(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run(*KL, seeds=3)
    report = json.loads((tmp_path / COMPARISON).read_text())
    seeds = report["seeds"]
    assert seeds["variants"] == {
        f"ppo.kl_coef={kl}": [f"kl_coef-{word}-seed-{seed}" for seed in range(3)]
        for kl, word in (("0.01", "0_01"), ("0.05", "0_05"))
    }
    found = seeds["differences"]["ppo.kl_coef=0.05"]["ppo.gold"]
    expected = stats.ttest_rel(GOLD[0.05], GOLD[0.01])
    low, high = expected.confidence_interval(0.95)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.09, low, high), abs=1e-9)
    page = (tmp_path / "smoke-sweep/comparison/compare.html").read_text()
    assert "Cells of smoke-sweep" in page and "seed by seed" in page


def test_the_run_of_the_sweep_has_what_the_cells_have_in_common(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run(*KL)
    whole, cell = (recorded.params_in(folder) for folder in (tmp_path / "smoke-sweep", folder_of(CELLS[3], tmp_path)))
    assert (cell["ppo.kl_coef"], cell["seed"]) == ("0.05", "1")
    assert whole == {name: value for name, value in cell.items() if name not in ("ppo.kl_coef", "seed")}
    events = [event for event, _ in read_lines(tmp_path / "smoke-sweep/events.jsonl")]
    tags = {name: value for event in events if event["event"] == "tags" for name, value in event["values"].items()}
    assert (tags["sweep.ppo.kl_coef"], tags["sweep.seed"]) == ("0.01, 0.05", "0, 1")
    assert "| kl_coef-0_01-seed-0 | finished |" in tags["mlflow.note.content"]
    parents = json.loads((folder_of(CELLS[0], tmp_path) / "mlflow.json").read_text())["parent_run_id"]
    assert parents == "" and json.loads((tmp_path / "smoke-sweep/mlflow.json").read_text())["parent_run_id"] is None
