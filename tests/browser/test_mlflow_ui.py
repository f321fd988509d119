"""Two runs with another KL coefficient, told apart in MLflow by a person with a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from launch import parent_run
from launch.settings import load
from rlhf.data import Split

pytest.importorskip("selenium", reason="selenium is not installed (extra dev)")

from tests.browser.mlflow_pages import CHROMIUM, DRIVER, REWARD, Pages, browser
from tests.rlhf.tracking.stores import server

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
RUNS = {"kl-02": ("0.02", 1.25), "kl-10": ("0.1", 0.75)}  # KL coefficient, reward

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium or no chromedriver on the PATH"),
]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store with the parents of two runs."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name, (kl_coef, reward) in RUNS.items():
        overrides = {"name": name, "runs_dir": str(tmp_path / "runs"), "tracking.uri": uri, "ppo.kl_coef": kl_coef}
        config = load(SMOKE, [word for key, value in overrides.items() for word in (f"--{key}", value)])
        roles = ("demonstrations", "preferences", "prompts")
        tracker = parent_run.begin(config, {role: Split([], [], {"shipped": "a"}, []) for role in roles})
        tracker.metrics({REWARD: reward, "eval/ppo/kl": 3.0}, step=0)
        for step in (1, 2, 3):
            tracker.metrics({"ppo/reward": reward * step / 3}, step)
        tracker.close()
    return uri


def test_a_person_finds_which_run_is_better_and_why(uri: str) -> None:
    (experiment,) = [e.experiment_id for e in MlflowClient(uri).search_experiments() if e.name == "rlhf"]
    with server(uri) as address, browser() as driver:
        pages = Pages(driver, address, experiment)
        pages.open_results()
        assert pages.column(REWARD) == ["0.75", "1.25"]  # the newest run first
        pages.compare(list(RUNS))
        pages.show_differences()
        assert pages.differing() == ["ppo.kl_coef"]
        (values,) = pages.rows("ppo.kl_coef")
        assert dict(zip(values, pages.metric(REWARD), strict=True)) == {"0.02": "1.25", "0.1": "0.75"}
        pages.open_chart("ppo/reward")
        pages.until(lambda: all(pages.has(f"{name} (ppo/reward)") for name in RUNS))
