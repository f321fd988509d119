"""`rlhf plan`: what it prints, its exit code, and the change that it names."""

import json
import shlex

import pytest

from launch.cli import main


def plan(capsys, *arguments):
    code = main(["plan", "llama2-chat", *arguments])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    "where", [["--gpu", "h100-80g"], ["--gpu", "h100-80g", "--hardware", "gpu-8", "--model", "llama-2-7b"]]
)
def test_what_does_not_fit_fits_with_the_change_that_is_named(capsys, where):
    small = [
        *where,
        "--reward.micro_batch_size",
        "16",
        "--sft.micro_batch_size",
        "1",
        "--hardware.workers_per_reward_model",
        "4",
    ]
    code, shown = plan(capsys, *small)
    assert code == 5
    assert "reward, update: a GPU needs" in shown and "most of it: reward model: activations" in shown
    line = shown.rstrip().rpartition("nearest change that fits: ")[2]
    code, shown = plan(capsys, *small, *shlex.split(line))
    assert (code, "fits: a GPU has at least" in shown) == (0, True)


def test_a_phase_is_the_sum_of_its_parts(capsys):
    code, shown = plan(capsys, "--gpu", "a100-80g", "--json")
    found = json.loads(shown)
    phases = {p["stage"]: p["phases"] for p in found["stages"]}
    assert list(phases["ppo"]) == ["opening", "sampling", "scoring", "update", "saving", "finishing"]
    for phase in phases["ppo"].values():
        assert phase["device_bytes"] == pytest.approx(sum(part["bytes"] for part in phase["device"]))
    assert (code, found["fits"]) == ((0, True) if not found["excesses"] else (5, False))


def test_nodes_use_all_their_gpus(capsys):
    _, shown = plan(capsys, "--gpu", "l40s-48g", "--nodes", "4", "--json")
    found = json.loads(shown)
    assert (found["nodes"], [s["workers"] for s in found["stages"]]) == (4, [16, 8, 16])


def test_a_price_gives_dollars_of_all_gpus(capsys):
    _, shown = plan(capsys, "--gpu", "h100-80g", "--price", "2.5", "--json")
    seconds = sum(json.loads(shown)["seconds"]["ppo"].values())
    _, shown = plan(capsys, "--gpu", "h100-80g", "--price", "2.5")
    dollars = 200 * seconds / 3600 * 64 * 2.5
    assert f"{dollars:,.0f} $" in shown


def test_a_machine_that_the_file_does_not_have_is_refused(capsys):
    assert main(["plan", "llama2-chat", "--gpu", "h100-80"]) == 2
    assert "did you mean h100-80g?" in capsys.readouterr().err


def test_a_model_of_unknown_sizes_is_refused(capsys):
    assert main(["plan", "llama2-chat", "--gpu", "h100-80g", "--model.path", "somebody/other"]) == 4
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "--model llama-2-7b",
        "--hardware gpu-8-offload",
        "--model llama-2-7b --hardware gpu-8",
        "--model llama-2-7b --model.lora.rank 16 --hardware gpu-1-offload",
    ],
)
@pytest.mark.parametrize("gpu", ["a100-80g", "h100-80g"])
def test_the_shipped_recipes_fit(capsys, recipe, gpu):
    code, shown = plan(capsys, "--gpu", gpu, *recipe.split())
    assert (code, "fits: a GPU has at least" in shown) == (0, True), shown


def test_a_sampler_larger_than_a_gpu_fits_with_no_change(capsys):
    code, shown = plan(capsys, "--gpu", "h100-80g", "--model", "llama-2-70b")
    assert (code, shown.rstrip().endswith("no change of these settings fits")) == (5, True)
