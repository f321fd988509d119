"""`rlhf plan`: what it prints, its exit code, and the change that it names."""

import json
import shlex
from dataclasses import replace

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
        "--model llama-2-70b --reward.micro_batch_size 1 --ppo.sampling.engine vllm --ppo.sampling.tensor_parallel 8",
    ],
)
@pytest.mark.parametrize("gpu", ["a100-80g", "h100-80g"])
def test_the_shipped_recipes_fit(capsys, recipe, gpu):
    code, shown = plan(capsys, "--gpu", gpu, *recipe.split())
    assert (code, "fits: a GPU has at least" in shown) == (0, True), shown


def test_a_sampler_larger_than_a_gpu_is_divided_among_the_gpus_of_a_node(capsys):
    code, shown = plan(capsys, "--gpu", "h100-80g", "--model", "llama-2-70b")
    divided = "--ppo.sampling.engine vllm --ppo.sampling.tensor_parallel 8"
    assert (code, shown.rstrip().endswith(f"--reward.micro_batch_size 1 {divided}")) == (5, True)


def test_a_model_larger_than_a_node_fits_with_no_change(capsys):
    code, shown = plan(capsys, "--gpu", "rtx-24g", "--model", "llama-2-70b")
    assert (code, shown.rstrip().endswith("no change of these settings fits")) == (5, True)


def test_workers_that_share_an_engine_hold_a_part_of_it(capsys):
    """70B in bf16 is 137.95 GB; it has eight heads of keys, each of 80 layers of 128 numbers, and as many of values."""
    more = ["--ppo.sampling.engine", "vllm", "--ppo.sampling.tensor_parallel", "8"]
    _, shown = plan(capsys, "--gpu", "h100-80g", "--model", "llama-2-70b", *more, "--json")
    found = json.loads(shown)
    phases = next(p for p in found["stages"] if p["stage"] == "ppo")["phases"]
    held = {
        name: {part["kind"]: part["bytes"] for part in phase["device"] if part["role"] == "sampler"}
        for name, phase in phases.items()
    }
    asleep = [part["bytes"] for part in phases["update"]["host"] if part["role"] == "sampler"]
    assert held["sampling"]["weights"] == held["opening"]["weights"] == 2 * 68976648192 / 8
    assert held["scoring"] == held["update"] == held["saving"] == {}
    assert asleep == [2 * 68976648192]  # all eight parts, on a node of eight
    each = 2 * 2 * 80 * 128 * (2048 + 512)  # of a row, in bf16
    assert held["sampling"]["KV cache"] % each == 0 and 0 < held["sampling"]["KV cache"] / each <= 64


def test_samplers_beside_the_workers_hold_nothing_on_theirs(capsys):
    """Seven engines of 13B for 512 responses; a worker's device holds less than that of a sampler."""
    more = ["--ppo.sampling.engine", "vllm", "--ppo.sampling.workers", "7", "--json"]
    code, shown = plan(capsys, "--gpu", "h100-80g", *more)
    found = json.loads(shown)
    phases = next(p for p in found["stages"] if p["stage"] == "ppo")["phases"]
    roles = {name: {part["role"] for part in phase["device"]} for name, phase in phases.items()}
    assert roles["sampling"] == {"sampler", "worker"} and code == 0
    assert all("sampler" not in roles[name] for name in ("opening", "scoring", "update", "saving"))
    assert [part["bytes"] for part in phases["sampling"]["device"] if part["kind"] == "weights"] == [2 * 13015864320]


def test_an_engine_of_several_workers_samples_faster_and_adds_up_between_them(capsys):
    def seconds(*more):
        _, shown = plan(capsys, "--gpu", "h100-80g", "--ppo.sampling.engine", "vllm", *more, "--json")
        return json.loads(shown)["seconds"]["ppo"]["sampling"]

    alone, four = seconds(), seconds("--ppo.sampling.tensor_parallel", "4")
    assert alone / 4 < four < alone


def test_workers_that_share_sequences_hold_a_slice_of_the_activations(capsys):
    """Nothing else that a worker holds changes."""

    def held(*more):
        ones = ["--sft.micro_batch_size", "1", "--reward.micro_batch_size", "1", "--ppo.micro_batch_size", "1"]
        _, shown = plan(capsys, "--gpu", "h100-80g", *ones, *more, "--json")
        found = json.loads(shown)
        return {
            (stage["stage"], phase, part["role"], part["kind"]): part["bytes"]
            for stage in found["stages"]
            for phase, of in stage["phases"].items()
            for part in of["device"]
            if part["kind"] != "fragmentation"
        } | found["seconds"]["ppo"]

    whole, sliced = held(), held("--hardware.sequence_parallel", "4")
    assert whole.keys() == sliced.keys()
    for key in whole:
        if isinstance(key, tuple) and key[3] == "activations" and key[1] in ("scoring", "update"):
            assert sliced[key] == pytest.approx(whole[key] / 4), key
        elif isinstance(key, tuple):
            assert sliced[key] == whole[key], key
    assert whole["sampling"] == sliced["sampling"] and whole["update"] < sliced["update"] < 4 * whole["update"]


def test_one_long_row_that_does_not_fit_is_shared(capsys):
    long = ["--gpu", "h100-80g", "--reward", "{max_length: 32768, micro_batch_size: 1}"]
    code, shown = plan(capsys, *long)
    line = shown.rstrip().rpartition("nearest change that fits: ")[2]
    assert code == 5 and line.startswith("--hardware.sequence_parallel")
    assert plan(capsys, *long, *shlex.split(line))[0] == 0


LARGE = ["--sft.batch_size", "512", "--reward.batch_size", "512", "--ppo.minibatch_size", "512"]


def grown(capsys, *arguments):
    """Exit code, nodes → cells of the table, and the last line."""
    code, shown = plan(capsys, *arguments)
    lines = [line.split() for line in shown.splitlines()]
    return (
        code,
        {int(cells[0]): cells[1:] for cells in lines if len(cells) > 3 and cells[0].isdigit() and cells[1].isdigit()},
        shown,
    )


def test_growth_is_compared_with_the_first_size_that_fits(capsys):
    code, rows, shown = grown(capsys, "--gpu", "h100-80g", "--nodes", "32", "2", "4", *LARGE)
    assert code == 0 and list(rows) == [2, 4, 32]
    seconds = {}
    for nodes in rows:
        _, alone = plan(capsys, "--gpu", "h100-80g", "--nodes", str(nodes), *LARGE, "--json")
        seconds[nodes] = sum(json.loads(alone)["seconds"]["ppo"].values())
        assert float(rows[nodes][1]) == pytest.approx(seconds[nodes], rel=0.01)
    assert rows[4][2:4] == ["1.0", "100%"] and "2: does not fit: ppo" in shown
    faster = seconds[4] / seconds[32]
    assert rows[32][2:4] == [f"{faster:.1f}", f"{faster / 8:.0%}"]
    assert shown.rstrip().splitlines()[-1].startswith("32 nodes lose more than half of the GPUs' time against 4")


def test_growth_names_the_settings_that_more_nodes_cannot_have(capsys):
    code, rows, shown = grown(capsys, "--gpu", "h100-80g", "--nodes", "4", "16")
    assert code == 0 and list(rows) == [4]
    assert "16: 2 mistakes in the settings" in shown and "sft.batch_size: is 64" in shown


def test_no_time_is_spent_on_the_way_inside_a_network_without_limits(capsys, monkeypatch):
    from launch.plan import command, growth
    from rlhf.planning.machines import machine_named

    machine = machine_named("h100-80g")
    config = command.load("llama2-chat", ["--hardware.workers", "8", "--hardware.workers_per_reward_model", "4"])
    fast = replace(machine, link_bandwidth=1e30, network_bandwidth=1e30)
    shape = command._shape(config)
    slow, ideal = (growth.size_of(config, shape, each, 1) for each in (machine, fast))
    assert slow.seconds - slow.moving == pytest.approx(ideal.seconds)
    assert slow.moving > 0 and ideal.moving == pytest.approx(0)


def test_growth_where_nothing_fits_ends_with_5(capsys):
    code, _, shown = grown(capsys, "--model", "llama-2-70b", "--gpu", "h100-80g", "--nodes", "1", "2")
    assert (code, shown.rstrip().splitlines()[-1]) == (5, "it fits on none of them")
