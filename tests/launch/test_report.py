"""The closing report says what the stages measured: the same figures in JSON, Markdown, plots and the terminal."""

import json
import math
import random
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import plots, profile_table, report
from launch.report.section import flat, nested
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import artifacts
from stages.base import STAGES, Stage

ROOT = Path(report.__file__).parents[2]
RATINGS = {"significantly": 0.97, "better": 0.93, "slightly": 0.82, "negligibly": 0.61}
EXTRA = {
    "seconds": {"sft": 61.2, "reward/helpfulness": 80.0, "reward/safety": 75.5},  # ppo was skipped
    "artifacts": {stage: f"runs/a/{stage}/artifact" for stage in ("sft", "reward/helpfulness", "reward/safety", "ppo")},
    "mlflow": {"tracking_uri": "sqlite:///mlflow.db", "run_id": "abc123"},
}
CONFIG = RunConfig.model_validate(
    {"name": "a", "data": {role: {"train": []} for role in ("demonstrations", "preferences", "prompts")}}
)


def estimate(value: float, half: float = 0.03, n: int = 200) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def reward_metrics(shift: float) -> dict[str, Any]:
    bins = [(0.5, 0.6, 0.55), (0.6, 0.7, 0.65), (0.7, 0.8, 0.75), (0.8, 0.9, 0.86), (0.9, 1.0, 0.98)]
    return {
        "accuracy": estimate(0.92 + shift),
        "ties": estimate(0.0, 0.0),
        "by_rating": {name: estimate(value + shift, 0.05, 50) for name, value in RATINGS.items()},
        "by_tag": {"helpful": estimate(0.9), "safety": estimate(0.94)},
        "length": {"chosen_is_longer": estimate(0.55), "model_prefers_longer": estimate(0.57)},
        "calibration": [
            {"low": low, "high": high, "predicted": mean, "observed": estimate(mean - 0.04, 0.05)}
            for low, high, mean in bins
        ],
        "offset": 0.4,
        "steps": 40,
    }


def policy(reward: float, gold: float) -> dict[str, Any]:
    return {
        "reward.helpfulness": estimate(reward, 0.1),
        "reward.safety": estimate(reward - 0.5, 0.1),
        "gold": estimate(gold),
        "length": estimate(20 + 4 * reward, 1.0),
        "eos_rate": estimate(0.5 + gold / 2),
        "distinct_2": estimate(0.9 - gold / 10),
    }


SAMPLES = [
    {
        "prompt": f"Count to {number}.\nThen stop.",
        "sft": "1 2 ```3```",
        "ppo": f"done <b>{number}</b>",
        "gold_sft": 0.25,
        "gold_ppo": 1.0,
        "reward.safety_ppo": 0.5,
    }
    for number in range(12)
]
MANIFESTS = {
    "sft": {"held_out_loss": 1.234, "steps": 50, "sequences": 1000},
    "reward/helpfulness": reward_metrics(0.0),
    "reward/safety": reward_metrics(0.02),
    "ppo": {
        "held_out": {"base": policy(-1.2, 0.1), "sft": policy(0.2, 0.55), "ppo": policy(1.4, 0.82)},
        "gain": {"reward.helpfulness": estimate(1.2, 0.05), "gold": estimate(0.27, 0.01)},
        "kl": 4.5,
        "iterations": 40,
        "best_iteration": 30,
        "alarms": [],
        "samples": SAMPLES,
    },
}


def perf(step: int) -> dict[str, float]:
    """An iteration of 10 s; every tenth takes 5 s more for a checkpoint."""
    seconds = {"sync": 0.5, "sampling": 4.0, "scoring": 1.0, "update": 3.0, "logging": 0.5, "other": 1.0}
    seconds |= {"evaluation": 0.0, "checkpoint": 5.0 * (step % 10 == 0)}
    metrics = {f"perf/seconds_{phase}": value for phase, value in seconds.items()}
    metrics |= {"perf/seconds_iteration": sum(seconds.values()), "perf/machine_flops": 2e12}
    metrics |= {"perf/machine_bandwidth": 1e11, "perf/memory_update": 1e9 + step, "perf/memory_sampling": 5e8}
    for phase in ("sampling", "scoring", "update"):
        tokens = {"useful": 600.0, "prompt": 300.0, "padded": 100.0, "dropped": 200.0 * (phase == "sampling")}
        metrics |= {f"perf/tokens_{phase}_{kind}": count for kind, count in tokens.items()}
        metrics |= {f"perf/roofline_fraction_{phase}": 0.5, f"perf/mfu_{phase}": 0.25}
    return metrics


def series(stage: str) -> list[dict[str, float]]:
    """A plausible metrics.jsonl."""
    noise = random.Random(len(stage))
    if stage == "ppo":
        lines = []
        for step in range(1, 41):
            rise = 1 - math.exp(-step / 15)
            lines.append(
                {
                    "step": step,
                    "ppo/reward": 1.5 * rise + noise.gauss(0, 0.1),
                    "ppo/kl": 5 * rise + noise.gauss(0, 0.2),
                    "ppo/length": 24 + 5 * rise + noise.gauss(0, 0.5),
                    "ppo/eos_rate": 0.8 + 0.15 * rise,
                    "ppo/entropy": 1.6 - 0.6 * rise,
                }
            )
            lines.append({"step": step, **perf(step)})
        for step in range(0, 41, 10):
            rise = 1 - math.exp(-step / 15)
            evaluation = {"eval/reward": 1.4 * rise, "eval/kl": 5 * rise, "eval/gold": 0.55 + 0.3 * rise}
            lines.append({"step": step, **evaluation, "eval/length": 24 + 5 * rise, "eval/eos_rate": 0.8 + 0.1 * rise})
        return lines
    name, last = ("sft", 2.0) if stage == "sft" else ("reward", 0.2)
    lines = [{"step": step, f"{name}/loss": last + math.exp(-step / 12) + noise.gauss(0, 0.03)} for step in range(50)]
    for line in lines:
        if name == "reward":
            line["reward/accuracy"] = 0.95 - 0.45 * math.exp(-line["step"] / 12) + noise.gauss(0, 0.02)
    held_out = "sft/held_out_loss" if stage == "sft" else "reward/held_out_accuracy"
    good = {step: (1 - math.exp(-step / 12)) for step in (12, 24, 36, 49)}
    return lines + [
        {"step": step, held_out: 3 - good[step] if name == "sft" else 0.5 + 0.42 * good[step]} for step in good
    ]


def stages_in(folder: Path, manifests: dict[str, Any]) -> Path:
    for stage, metrics in manifests.items():
        artifact = artifacts.begin(folder / stage / "artifact")
        (artifact / "model.bin").write_bytes(b"weights")
        artifacts.complete(artifact, stage, {}, "settings", metrics)
        text = "".join(json.dumps({"time": 0, **line}) + "\n" for line in series(stage))
        (folder / stage / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stages_in(tmp_path_factory.mktemp("run"), MANIFESTS)


@pytest.fixture(scope="module")
def built(folder):
    return report.build(folder, CONFIG, EXTRA)


def leaves(value: Any, path: str = "") -> set[str]:
    """Dotted paths to everything that is not a mapping."""
    if not isinstance(value, dict):
        return {path}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}" if path else key)}


def test_every_promised_key_is_there(built):
    metrics = ("value", "low", "high", "n")
    names = ("helpfulness", "safety")
    promised = {f"reward.{name}.accuracy.{figure}" for name in names for figure in metrics}
    promised |= {f"reward.{name}.by_rating.{r}.{figure}" for name in names for r in RATINGS for figure in metrics}
    held_out = ("reward.helpfulness", "reward.safety", "gold", "length", "eos_rate", "distinct_2")
    for who in ("base", "sft", "ppo"):
        promised |= {f"ppo.held_out.{who}.{name}.{figure}" for name in held_out for figure in metrics}
    promised |= {"ppo.kl", "seconds.sft", "artifacts.ppo", "mlflow.tracking_uri", "mlflow.run_id"}
    assert promised - leaves(built) == set()


def test_figures_are_those_of_the_manifests(built):
    assert built["reward"]["safety"]["by_rating"]["slightly"] == estimate(0.84, 0.05, 50)
    assert built["ppo"]["held_out"]["ppo"]["reward"]["helpfulness"] == estimate(1.4, 0.1)
    assert built["sft"]["held_out_loss"] == 1.234


def test_report_json_is_the_report(folder, built):
    assert json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail) == built


def test_a_stage_that_is_not_complete_is_named(tmp_path):
    stages_in(tmp_path, {"sft": MANIFESTS["sft"]})
    with pytest.raises(UserError, match="reward/helpfulness") as caught:
        report.build(tmp_path, CONFIG, EXTRA)
    assert caught.value.exit_code == 4


def test_every_plot_of_the_markdown_is_a_png(folder, built):
    names = re.findall(r"\]\((plots/.*?)\)", (folder / "report.md").read_text())
    assert len(names) == 2
    assert {(folder / name).read_bytes()[:8] for name in names} == {b"\x89PNG\r\n\x1a\n"}
    assert {path.name for path in (folder / "plots").iterdir()} == {Path(name).name for name in names}


def test_markdown_shows_ten_samples_before_and_after(folder, built):
    text = (folder / "report.md").read_text()
    assert text.count("**Prompt**") == text.count("**sft: gold 0.25**") == 10
    assert text.count("**ppo: gold 1.00, reward.safety 0.50**") == 10


def test_a_score_that_failed_is_said_to_have_failed(tmp_path):
    samples = [{**SAMPLES[0], "reward.mine_sft": None, "reward.mine_ppo": 0.125}]
    report.build(stages_in(tmp_path, {**MANIFESTS, "ppo": {**MANIFESTS["ppo"], "samples": samples}}), CONFIG, EXTRA)
    text = (tmp_path / "report.md").read_text()
    assert "**sft: gold 0.25, reward.mine failed**" in text
    assert "**ppo: gold 1.00, reward.safety 0.50, reward.mine 0.12**" in text


def test_a_sample_cannot_break_out_of_its_block(folder, built):
    text = (folder / "report.md").read_text()
    assert "````text\n1 2 ```3```\n````" in text


def test_terminal_and_markdown_show_the_same_figures(folder, built):
    from rich.console import Console

    screen = StringIO()
    Console(file=screen, width=80).print(report.render(built))
    for text in (screen.getvalue(), (folder / "report.md").read_text()):
        for figure in ("0.94 [0.91, 0.97]", "0.82 [0.79, 0.85]", "25.6 [24.6, 26.6]", "-1.20 [-1.30, -1.10]"):
            assert figure in text
        assert "4.50 nats" in text and "number 30 kept" in text and "run abc123" in text


def test_an_alarm_stands_on_top_of_markdown_and_terminal(tmp_path):
    from rich.console import Console

    entry = {"name": "kl", "text": "KL is 61 nats per response, over 50", "first": 12, "iterations": 3}
    stages_in(tmp_path, MANIFESTS | {"ppo": {**MANIFESTS["ppo"], "alarms": [entry]}})
    built = report.build(tmp_path, CONFIG, EXTRA)
    line = "PPO, iteration 12: KL is 61 nats per response, over 50 (in 3 of 40 iterations)"
    screen = StringIO()
    Console(file=screen, width=120).print(report.render(built))
    assert screen.getvalue().startswith(f"warning: {line}\n")
    assert f"\n\n> **Warning.** {line}\n\n## " in (tmp_path / "report.md").read_text()


def test_a_run_without_alarms_has_no_warning(folder, built):
    assert "arning" not in (folder / "report.md").read_text()


def test_a_stage_that_was_skipped_before_its_time_was_taken_has_a_dash(built):
    stages = report.tables(built)[-1]
    assert [row[:2] for row in stages.rows][-1] == ("ppo", "–")


def test_the_ledger_is_a_mean_iteration_by_hand(built):
    profile = built["ppo"]["profile"]
    assert (profile["iterations"], profile["seconds"]) == (40, 10.5)
    assert profile["machine"] == {"flops": 2e12, "bandwidth": 1e11}
    phases = profile["phases"]
    assert sum(phase["seconds"] for phase in phases.values()) == profile["seconds"]
    assert phases["checkpoint"] == {"seconds": 0.5, "fraction": 0.5 / 10.5}
    assert phases["sampling"] == {
        "seconds": 4.0,
        "fraction": 4.0 / 10.5,
        "memory": 5e8,
        "tokens": {"useful": 600.0, "prompt": 300.0, "padded": 100.0, "dropped": 200.0},
        "token_efficiency": 0.5,
        "tokens_per_second": 900.0 / 4.0,
        "mfu": 0.25,
        "roofline_fraction": 0.5,
    }
    assert phases["update"]["memory"] == 1e9 + 40


def test_the_ledger_is_a_table_of_the_markdown(folder, built):
    text = (folder / "report.md").read_text()
    assert "## PPO: a mean iteration; the machine's limit: 2000 GFLOP/s, 100 GB/s" in text
    assert "| sampling | 4 | 38.1 | 225 | 50 | 25 | 50 | 0.50 |" in text
    assert "| checkpoint | 0.5 | 4.8 |  |  |  |  |  |" in text


def test_an_iteration_whose_time_was_not_taken_to_the_end_is_left_out():
    points = {name: [(1, value), (2, value)] for name, value in perf(1).items()}
    points["perf/seconds_iteration"] = [(1, 10.0)]
    assert profile_table.account(points) == profile_table.account(
        {name: [(1, value)] for name, value in perf(1).items()}
    )


def test_what_was_done_beside_another_phase_counts_for_speeds_and_not_for_the_time():
    """6 s beside the sampling, 1 s of its own; at half of the limit in either."""
    metrics = perf(1) | {"perf/overlapped_seconds_scoring": 6.0, "perf/overlapped_seconds_sampling": 0.0}
    phases = profile_table.account({name: [(1, value)] for name, value in metrics.items()})["phases"]
    assert phases["scoring"]["seconds"] == 1.0 and phases["scoring"]["overlapped"] == 6.0
    assert phases["scoring"]["tokens_per_second"] == pytest.approx(900.0 / 7.0)
    assert phases["scoring"]["roofline_fraction"] == pytest.approx(0.5)
    assert "overlapped" not in phases["sampling"] and sum(phase["seconds"] for phase in phases.values()) == 10.0


def test_headline_names_the_figures_to_compare_runs_by(built):
    metrics = report.headline(built)
    assert metrics["eval/accuracy_helpfulness"] == 0.92
    assert metrics["eval/ppo/reward_helpfulness"] == 1.4
    assert metrics["eval/sft/gold"] == 0.55


def test_a_run_without_gold_or_metrics_files_is_reported_too(tmp_path):
    manifests = json.loads(json.dumps(MANIFESTS))
    for who in ("base", "sft", "ppo"):
        del manifests["ppo"]["held_out"][who]["gold"]
    manifests["ppo"]["held_out"]["base"]["distinct_2"] = estimate(math.nan)
    manifests["ppo"]["kl"] = math.nan
    del manifests["ppo"]["samples"]
    stages_in(tmp_path, manifests)
    for path in tmp_path.rglob("metrics.jsonl"):
        path.unlink()
    built = report.build(tmp_path, CONFIG, {**EXTRA, "mlflow": {"tracking_uri": None, "run_id": None}})
    assert "gold" not in built["ppo"]["held_out"]["ppo"]
    assert built["ppo"]["profile"] == {} and "limit" not in (tmp_path / "report.md").read_text()
    assert "not recorded" in (tmp_path / "report.md").read_text()


def test_a_shorter_pipeline_is_reported_by_what_it_has(tmp_path):
    stages_in(tmp_path, {name: MANIFESTS[name] for name in ("sft", "reward/helpfulness", "reward/safety")})
    built = report.build(tmp_path, CONFIG.model_copy(update={"pipeline": ["sft", "reward"]}), EXTRA)
    assert [name for name in ("sft", "reward", "ppo") if name in built] == ["sft", "reward"]
    assert list(report.headline(built)) == ["eval/accuracy_helpfulness", "eval/accuracy_safety"]
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"plots/(\w+).png", text) == ["reward_accuracy"] and "PPO" not in text


def test_a_stage_without_a_section_of_its_own_is_reported_by_its_estimates_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "tune", Stage("tune", ()))
    metrics = {"accuracy": estimate(0.7), "by_rating": {"better": estimate(0.8)}, "bins": [1], "steps": 40}
    stages_in(tmp_path, {"tune": metrics})
    built = report.build(tmp_path, CONFIG.model_copy(update={"pipeline": ["tune"]}), EXTRA)
    assert built["tune"] == metrics and report.headline(built) == {"eval/tune/accuracy": 0.7}
    text = (tmp_path / "report.md").read_text()
    assert "## TUNE: held-out metrics" in text and "| accuracy | 0.70 [0.67, 0.73] |" in text
    assert "| by_rating.better | 0.80 [0.77, 0.83] |" in text and "- TUNE: steps 40\n" in text


estimates = st.fixed_dictionaries({"value": st.floats(-5, 5)})


@given(st.dictionaries(st.sampled_from(["reward.a", "reward.b", "gold", "length"]), estimates))
def test_flat_undoes_nesting(metrics):
    assert dict(flat(nested(metrics))) == metrics


def test_a_plot_with_one_model_and_one_rating_is_drawn():
    one = {**reward_metrics(0.0), "by_rating": {"unrated": estimate(0.6)}}
    assert plots.reward_accuracy({"helpfulness": one}).startswith(b"\x89PNG")


def test_import_loads_neither_torch_nor_matplotlib():
    code = "import sys, launch.report; print([m for m in ('torch', 'matplotlib', 'mlflow') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "[]"


DOCUMENT = (ROOT / "docs" / "metrics.md").read_text()


def in_general(key: str) -> str:
    """reward.safety.by_rating.better.low -> reward.<name>.by_rating.<rating>."""
    key = re.sub(r"\.(value|low|high|n)$", "", key)
    key = re.sub(r"^(seconds|artifacts)\..*", r"\1.<stage>", key)
    key = re.sub(r"profile\.phases\.\w+", "profile.phases.<phase>", key)
    key = re.sub(r"tokens\.\w+", "tokens.<kind>", key)
    key = re.sub(r"\breward\.(helpfulness|safety)", "reward.<name>", key)
    key = re.sub(r"held_out\.(base|sft|ppo)", "held_out.<policy>", key)
    return re.sub(r"by_(rating|tag)\.\w+", r"by_\1.<\1>", key)


def test_every_key_of_the_report_is_defined(built):
    keys = {in_general(key) for key in leaves(built)}
    assert [key for key in sorted(keys) if f"| `{key}` |" not in DOCUMENT] == []


def test_every_metric_in_the_source_is_defined():
    source = "".join(path.read_text() for room in ("rlhf", "stages") for path in (ROOT / room).rglob("*.py"))
    names = set(re.findall(r'"((?:sft|reward|dpo|ppo|eval|perf)/[a-z0-9_]+)"', source)) - {"reward/helpfulness"}
    names = {
        re.sub(r"^perf/tokens_\w+?_(useful|prompt|padded|dropped)$", "perf/tokens_<phase>_<kind>", n) for n in names
    }
    assert len(names) > 30
    assert [name for name in sorted(names) if f"| `{name}` |" not in DOCUMENT] == []


def test_every_defined_metric_is_in_the_source():
    source = "".join(path.read_text() for room in ("rlhf", "stages") for path in (ROOT / room).rglob("*.py"))
    defined = re.findall(r"\| `((?:sft|reward|dpo|ppo)/[a-z0-9_]+)` \|", DOCUMENT)
    assert [name for name in defined if f'"{name}"' not in source] == []
