"""The benchmark of sampling on a random model of a few thousand parameters, and its limit worked by hand."""

import importlib.util
import json

import pytest
import torch

from benchmarks import sampling
from benchmarks.limits import least_seconds
from rlhf.profiling.roofline import Machine, ModelSize

ARGUMENTS = [
    "--quick",
    "--rows",
    "3",
    "--fixed-tokens",
    "6",
    "--natural-tokens",
    "20",
    "--repeats",
    "2",
    "--precision",
    "float32",
]


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(sampling, "vllm_is_there", lambda: False)


@pytest.fixture
def with_vllm():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed: make vllm installs it")
    with torch._dynamo.config.patch(disable=True):  # compiling takes longer than the test
        yield
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    cleanup_dist_env_and_memory()


@pytest.mark.usefixtures("without_vllm")
def test_a_quick_run_prints_one_table_and_writes_its_figures(tmp_path, capsys):
    results = check_quick_run(tmp_path / "sampling.json", capsys)
    assert all(result["times_vllm"] is None and "vllm" not in result["median"] for result in results)


@pytest.mark.usefixtures("with_vllm")
def test_vllm_takes_part_where_it_is_installed(tmp_path, capsys):
    for result in check_quick_run(tmp_path / "sampling.json", capsys):
        assert result["times_vllm"] == result["median"]["ours"] / result["median"]["vllm"]


def check_quick_run(out, capsys):
    sampling.main([*ARGUMENTS, "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    assert [r["lengths"] for r in results] == ["fixed", "natural"]
    assert results[0]["answer_tokens"] == 6
    assert 1 <= results[1]["answer_tokens"] <= 20
    for result in results:
        assert all(len(rates) == 2 for rates in result["tokens_per_second"].values())
        assert result["times_generate"] == result["median"]["ours"] / result["median"]["generate"]
        assert result["share_of_limit"] > 0
    assert sampling.table(results) in capsys.readouterr().out
    return results


def test_both_sides_count_the_tokens_up_to_the_end_and_no_others():
    """The same greedy answers, so the same lengths, in one order or another."""
    torch.manual_seed(0)
    model, prompts, eos_id, pad_id = sampling.tiny()
    subject = sampling.Subject(model, sampling.InProcessSampler(model, [eos_id], pad_id), prompts, eos_id, pad_id)
    cold = sampling.Setting("float32", 3, "natural", 20, 1e-4)
    first = sampling.ours(subject, cold, prompts, 0)
    assert sorted(first) == sorted(sampling.generate(subject, cold, prompts, 0))


def test_the_least_time_by_hand():
    machine, size = Machine(flops=100.0, bandwidth=10.0), ModelSize(5, 2, 0, 0, 0, 0, weight_bytes=28, cache_bytes=4)
    reading = 2 * (5 * (3 + 4) + 2 * 2) / 100
    seen = (3 + 1) + (4 + 1) + (4 + 2)  # the second answer has one token more to read its past for
    narrow = least_seconds(machine, size, [3, 4], [2, 3], rows=1)
    assert narrow == pytest.approx(reading + 3 * 28 / 10 + seen * 4 / 10)  # three steps stream the weights
    fast_memory = Machine(flops=100.0, bandwidth=1e9)
    assert least_seconds(fast_memory, size, [3, 4], [2, 3], rows=2) == pytest.approx(reading + 2 * 7 * 3 / 100)
