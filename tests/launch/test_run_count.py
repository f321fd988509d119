"""How many MLflow runs a pipeline has: MLflow slows with many."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launch import pipeline, worker_group
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.tracking import fill_in, open_tracker
from tests.launch.fake_worker_group import STAGES, FakeWorkerGroup, few_shipped_rows, no_cluster

SMOKE = Path(__file__).parents[1] / "smoke.yaml"


class TrackedWorkerGroup(FakeWorkerGroup):
    """Records its stage as a worker does."""

    def __init__(self, config: RunConfig, stage: str, workers: int) -> None:
        tracker = open_tracker(config.folder / stage, config.tracking, stage, "", is_writer=True)
        super().__init__(config, stage, workers)
        tracker.metrics({"loss": 1.0}, 1)
        tracker.close("FAILED" if self.error else "FINISHED")


@pytest.fixture
def meets(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """Which stage fails with what."""
    meets: dict[str, BaseException] = {}
    monkeypatch.setattr(FakeWorkerGroup, "started", [], raising=False)
    monkeypatch.setattr(FakeWorkerGroup, "meets", meets, raising=False)
    monkeypatch.setattr(worker_group, "cluster", no_cluster)
    monkeypatch.setattr(worker_group, "WorkerGroup", TrackedWorkerGroup)
    monkeypatch.setattr(worker_group, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    monkeypatch.setattr(pipeline, "_report", lambda config, tracker, seconds: tracker.close())
    return meets


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_pipeline_has_one_run_and_one_per_part_of_a_stage(tmp_path: Path, meets: dict[str, BaseException]) -> None:
    """A failure, a resume, and a repetition add none. Another setting makes a new parent and runs of what is made again."""
    from mlflow import MlflowClient

    def run(*overrides: str) -> None:
        own = ["--runs_dir", str(tmp_path), "--tracking.uri", uri, "--hardware.workers", "1", *overrides]
        pipeline.run(load(SMOKE, own), fresh=False)

    def runs() -> list[Any]:
        config = load(SMOKE, ["--runs_dir", str(tmp_path), "--tracking.uri", uri])
        for state in sorted(config.folder.rglob("mlflow.json"), key=lambda path: len(path.parts)):
            assert any(fill_in(state.parent, config.tracking) for _ in range(5))
        return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    (tmp_path / "shipped").mkdir()
    with few_shipped_rows(tmp_path / "shipped"):
        meets["ppo"] = UserError("it broke", 5)
        with pytest.raises(UserError, match="it broke"):
            run()
        once = ["smoke", *STAGES]
        assert sorted(one.info.run_name for one in runs()) == sorted(once)
        meets.clear()
        for _ in range(2):
            run()
            assert sorted(one.info.run_name for one in runs()) == sorted(once)
        (parent,) = [one.info.run_id for one in runs() if one.info.run_name == "smoke"]
        assert {one.data.tags["mlflow.parentRunId"] for one in runs() if one.info.run_id != parent} == {parent}
        run("--ppo.kl_coef", "0.3")
        found = runs()
    assert Counter(one.info.run_name for one in found) == Counter([*once, "smoke", "ppo"])
    newest = next(one.info.run_id for one in found if one.info.run_name == "smoke" and one.info.run_id != parent)
    assert [one.info.run_name for one in found if one.data.tags.get("mlflow.parentRunId") == newest] == ["ppo"]
