"""`rlhf compare` on runs whose every difference is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from scipy.stats import ttest_rel

from launch.cli import main
from launch.compare.compare import compare_runs, warnings
from launch.compare.plots import colours_of, panels
from launch.compare.record import from_folders
from launch.compare.settings import variants
from launch.compare.tables import difference, precise
from rlhf.config import TrackingConfig
from rlhf.errors import UserError
from rlhf.tracking import fill_in, open_parent
from tests.launch.recorded_run import PROMPTS, record_run

LOW = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
HIGH = tuple(value + shift for value, shift in zip(LOW, (0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1), strict=True))


def compared(*folders: Path, out: Path | None = None) -> dict:
    return compare_runs([str(folder) for folder in folders], None, "rlhf", out)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [
        record_run(tmp_path, "low", "--ppo.kl_coef", "0.5", gold=LOW),
        record_run(tmp_path, "high", "--ppo.kl_coef", "0.01", gold=HIGH),
    ]


def test_the_setting_that_differs_is_named_and_no_other(two: list[Path]) -> None:
    assert compared(*two)["settings"] == {"ppo.kl_coef": {"low": "0.5", "high": "0.01"}}


def test_results_stand_side_by_side(two: list[Path]) -> None:
    found = compared(*two)["results"]
    assert found["ppo.gold"]["low"]["value"] == pytest.approx(0.45)
    assert found["ppo.gold"]["high"]["value"] == pytest.approx(0.5625)
    assert found["sft.held_out_loss"] == {"low": {"value": 2.5}, "high": {"value": 2.5}}
    assert set(found) == {"sft.held_out_loss", "reward/safety.accuracy", "ppo.gold", "ppo.reward.safety"}


def test_the_difference_is_taken_prompt_by_prompt(two: list[Path]) -> None:
    """The values spread over .7, their differences over .1: an interval that is narrow is a paired one."""
    found = compared(*two)["differences"]["high"]["ppo.gold"]
    assert found["value"] == pytest.approx(0.1125) and found["n"] == 8
    assert 0.09 < found["low"] < 0.1125 < found["high"] < 0.15


def test_the_order_of_the_prompts_does_not_matter(two: list[Path], tmp_path: Path) -> None:
    turned = record_run(tmp_path, "turned", gold=HIGH[::-1], prompts=PROMPTS[::-1])
    assert compared(two[0], turned)["differences"]["turned"]["ppo.gold"]["high"] < 0.15


def test_runs_with_other_prompts_are_said_to_differ_and_are_not_paired(two: list[Path], tmp_path: Path) -> None:
    other = record_run(tmp_path, "other", gold=HIGH, prompts=[*PROMPTS[:6], "x", "y"])
    found = compared(two[0], other)
    assert found["differences"]["other"] == {}
    assert found["not_paired"] == {"other": {"ppo": "other held-out items: 6 in common of 8 and 8"}}
    assert any("other is not paired with low in ppo" in line for line in warnings(found))


def test_data_that_differ_are_named(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = record_run(tmp_path, "other", "--ppo.kl_coef", "0.5", gold=HIGH, digest="b")
    found = compared(two[0], other)
    assert found["data"]["prompts: file"] == {"low": "a", "other": "b"} and not found["settings"]
    assert "data differ: demonstrations: file" in capsys.readouterr().out


def test_runs_that_keep_no_values_by_prompt_are_not_paired(two: list[Path]) -> None:
    (two[1] / "ppo/artifact/held_out.jsonl").unlink()
    found = compared(*two)
    assert found["differences"]["high"] == {}
    assert [line for line in warnings(found)] == [
        "high has kept no values by prompt, so it is not paired: an earlier version made it"
    ]


def test_a_run_that_has_not_finished_has_settings_and_curves(two: list[Path]) -> None:
    (two[1] / "report.json").unlink()
    found = compared(*two)
    assert "high" not in found["results"]["ppo.gold"]
    assert found["curves"]["high"]["ppo/reward"] == [(1, pytest.approx(0.28125)), (2, pytest.approx(0.5625))]
    assert "high has no report: it has not finished" in list(warnings(found))


# --- seeds ------------------------------------------------------------------------------------------------------------

OF_SEED = {0: (0.30, 0.42), 1: (0.50, 0.55), 2: (0.40, 0.47)}  # gold with a high and with a low coefficient


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    def one(coef: str, seed: int, gold: float) -> Path:
        prompts = [f"{seed} {prompt}" for prompt in PROMPTS]  # another seed holds out other prompts
        name = f"kl-{coef.replace('.', '')}-{seed}"
        return record_run(tmp_path, name, "--ppo.kl_coef", coef, "--seed", str(seed), gold=[gold] * 8, prompts=prompts)

    return [one(coef, seed, of[n]) for n, coef in enumerate(("0.5", "0.01")) for seed, of in OF_SEED.items()]


def test_runs_that_differ_in_the_seed_alone_are_one_variant(seeds: list[Path]) -> None:
    found = compared(*seeds)["seeds"]["variants"]
    assert {name: len(runs) for name, runs in found.items()} == {"ppo.kl_coef=0.5": 3, "ppo.kl_coef=0.01": 3}


def test_variants_are_paired_by_seed_as_the_t_test_pairs_them(seeds: list[Path]) -> None:
    found = compared(*seeds)["seeds"]["differences"]["ppo.kl_coef=0.01"]["ppo.gold"]
    high, low = zip(*OF_SEED.values(), strict=True)
    expected = ttest_rel(low, high).confidence_interval()
    assert found["n"] == 3 and found["value"] == pytest.approx(0.08)
    assert (found["low"], found["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_only_seeds_that_both_have_are_paired(seeds: list[Path]) -> None:
    found = compared(*seeds[:5])["seeds"]["differences"]["ppo.kl_coef=0.01"]["ppo.gold"]
    assert found["n"] == 2 and found["value"] == pytest.approx((0.12 + 0.05) / 2)


def test_a_single_seed_has_no_interval_over_seeds(two: list[Path]) -> None:
    assert compared(*two)["seeds"] == {}


def test_other_data_is_another_variant(two: list[Path], tmp_path: Path) -> None:
    other = record_run(tmp_path, "other", "--ppo.kl_coef", "0.5", "--seed", "1", gold=HIGH, digest="b")
    assert list(variants(from_folders([two[0], other]))) == ["low", "other"]


def test_runs_of_a_variant_share_a_colour(seeds: list[Path]) -> None:
    colours = colours_of(compared(*seeds))
    assert len({*map(str, colours.values())}) == 2 and colours["kl-05-0"] == colours["kl-05-2"]


def test_seeds_of_the_only_variant_have_colours_of_their_own() -> None:
    report = {"seeds": {"variants": {"one": ["one", "two"]}}, "runs": [{"name": "one"}, {"name": "two"}]}
    assert len({*map(str, colours_of(report).values())}) == 2


# --- what people see --------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_and_has_the_figures_of_the_terminal(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    compared(*two, out=tmp_path / "out")
    shown, page = capsys.readouterr().out, (tmp_path / "out/compare.html").read_text()
    report = json.loads((tmp_path / "out/report.json").read_text())
    figure = difference(report["differences"]["high"]["ppo.gold"])
    assert figure.endswith("*") and figure in page and figure in shown
    assert page.count("<svg") == 3 and "src=" not in page and "ppo.kl_coef" in page


def test_curves_that_are_the_same_in_all_runs_are_not_drawn() -> None:
    same = {"sft/loss": [(1, 2.0)], "reward/loss (safety)": [(1, 1.0)], "ppo/kl": [(1, 0.1)]}
    curves = {"a": same, "b": same | {"ppo/kl": [(1, 0.2)]}}
    assert [panel[0] for panel in panels(curves)] == ["PPO: KL to the SFT model"]


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        ((0.0042, 0.0021, 0.0063), "+0.0042 [0.0021, 0.0063] *"),
        ((-0.5, -1.5, 0.5), "-0.5 [-1.5, 0.5]"),
        ((0.0, 0.0, 0.0), "equal"),
        ((120.0, 90.0, 150.0), "+120 [90, 150] *"),
    ],
)
def test_a_difference_has_two_digits_of_its_interval(estimate: tuple[float, float, float], expected: str) -> None:
    assert difference(dict(zip(("value", "low", "high"), estimate, strict=True))) == expected


def test_a_value_without_spread_is_short() -> None:
    assert precise({"value": 1.0, "low": 1.0, "high": 1.0}) == "1 [1, 1]"


# --- MLflow -----------------------------------------------------------------------------------------------------------


def test_mlflow_tells_the_same_as_the_folders(two: list[Path], tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for folder in two:
        assert fill_in(folder, TrackingConfig(uri=store))
    of_folders, of_mlflow = compared(*two), compare_runs(["low", "high"], store, "rlhf", None)
    for key in ("settings", "data", "results", "differences", "not_paired", "baseline"):
        assert of_mlflow[key] == of_folders[key], key
    shown = of_mlflow["curves"]["high"]["ppo/reward"]
    assert shown == of_folders["curves"]["high"]["ppo/reward"]
    with pytest.raises(UserError, match="has no run 'middle'; it has high, low"):
        compare_runs(["low", "middle"], store, "rlhf", None)
    with pytest.raises(UserError, match="no experiment 'other'"):
        compare_runs(["low", "high"], store, "other", None)


def test_cells_of_a_sweep_are_found_in_mlflow(tmp_path: Path) -> None:
    open_parent(tmp_path / "grid", TrackingConfig(uri=None), "grid", "digest").close()
    for name, kl_coef in (("low", "0.01"), ("high", "0.05")):
        record_run(tmp_path / "grid", name, "--ppo.kl_coef", kl_coef)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert fill_in(tmp_path / "grid", TrackingConfig(uri=store))
    report = compare_runs(["low", "high"], store, "rlhf", None)
    assert report["settings"] == {"ppo.kl_coef": {"low": "0.01", "high": "0.05"}}
    (run,) = MlflowClient(store).search_runs(["1"], "attributes.run_name = 'low'")
    parent = MlflowClient(store).get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "grid"


def test_the_option_says_its_new_name(capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "--tracking", "sqlite:///a.db", "low", "high"]) == 2
    assert "--tracking is renamed to --tracking-uri" in capsys.readouterr().err


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        compare_runs(["low", "high"], f"sqlite:///{tmp_path}/none.db", "rlhf", None)
    assert not (tmp_path / "none.db").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_one_run_is_no_comparison(two: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", str(two[0])]) == 2
    assert "needs two runs" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", str(two[0]), str(tmp_path / "none")]) == 4
    assert "is no folder of a run" in capsys.readouterr().err


def test_a_run_is_not_compared_with_itself(two: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", str(two[0]), str(two[0])]) == 2
    assert "named twice" in capsys.readouterr().err
