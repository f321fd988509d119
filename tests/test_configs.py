"""Every packaged file parses and resolves, on every hardware that it is meant for, and the recipe has its published figures."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from launch import yaml_tree
from launch.settings import dump, load
from rlhf.config import RunConfig

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RUNS = sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml"))
HARDWARE = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
SMALL_BATCHES = {("smollm2-hh", "cluster-64")}  # batches of 16 cannot be split over 64 workers


def test_the_promised_files_are_there() -> None:
    assert RUNS == ["llama2-chat", "quickstart", "quickstart-dpo", "smollm2-hh"]
    assert HARDWARE == ["cluster-64", "cpu-2x1-bf16", "gpu-1", "gpu-1-offload", "gpu-8", "gpu-8-offload", "laptop"]
    assert MODELS == ["llama-2-13b", "llama-2-70b", "llama-2-7b", "smollm2-135m", "tiny"]
    assert sorted(path.stem for path in (CONFIGS / "stage").glob("*.yaml")) == ["llama2-chat", "small"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_begins_by_saying_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")
    assert yaml_tree.read(path, path.name)[1] == []


@pytest.mark.parametrize(("run", "hardware"), [pair for pair in product(RUNS, HARDWARE) if pair not in SMALL_BATCHES])
@pytest.mark.parametrize("model", MODELS)
def test_every_run_resolves_on_every_hardware_with_every_model(run: str, hardware: str, model: str) -> None:
    config = load(run, ["--hardware", hardware, "--model", model])
    for stage, batch, micro, workers in (
        ("sft", config.sft.batch_size, config.sft.micro_batch_size, config.hardware.workers),
        ("reward", config.reward.batch_size, config.reward.micro_batch_size, config.reward_workers),
        ("dpo", config.dpo.batch_size, config.dpo.micro_batch_size, config.hardware.workers),
        ("ppo", config.ppo.minibatch_size, config.ppo.micro_batch_size, config.hardware.workers),
    ):
        assert stage not in config.pipeline or batch % (micro * workers) == 0
    assert config.ppo.batch_size % config.ppo.minibatch_size == 0


@pytest.mark.parametrize("run", RUNS)
def test_a_printed_run_is_the_same_run(run: str, tmp_path: Path) -> None:
    config = load(run, [])
    (tmp_path / "printed.yaml").write_text(dump(config))
    assert load(tmp_path / "printed.yaml", []) == config


def test_one_changed_line_takes_quickstart_to_64_gpus(tmp_path: Path) -> None:
    lines = (CONFIGS / "run/quickstart.yaml").read_text().splitlines()
    changed = ["hardware: cluster-64" if line.startswith("hardware:") else line for line in lines]
    assert sum(old != new for old, new in zip(lines, changed, strict=True)) == 1
    (tmp_path / "big.yaml").write_text("\n".join(changed))
    small, big = load("quickstart", []), load(tmp_path / "big.yaml", [])
    assert (big.hardware.workers, big.hardware.gpus_per_worker) == (64, 1)
    assert [s.batch_size for s in (big.sft, big.reward, big.ppo)] == [
        s.batch_size for s in (small.sft, small.reward, small.ppo)
    ]


def test_quickstart_uses_the_shipped_data_and_its_gold_score() -> None:
    data = load("quickstart", []).data
    for role in (data.demonstrations, data.preferences, data.prompts):
        assert role is not None
        assert [(s.path, s.split) for s in role.train] == [("shipped", "train")]
        assert [(s.path, s.split) for s in role.held_out] == [("shipped", "held_out")]
    assert data.gold == "shipped"


def test_smollm2_hh_keeps_the_parts_of_the_split_apart() -> None:
    data = load("smollm2-hh", []).data
    roles = [role for role in (data.demonstrations, data.preferences, data.prompts) if role is not None]
    trained, held_out = (
        [{source.select_key for source in part} for part in parts]
        for parts in ([role.train for role in roles], [role.held_out for role in roles])
    )
    assert trained == [{"sft"}, {"rm_train", "sft"}, {"ppo_prompts"}]
    assert held_out == [set(), {"rm_val"}, {"rm_val"}]  # what one role holds out no role trains on


@pytest.fixture(scope="module")
def recipe() -> RunConfig:
    return load("llama2-chat", [])


# arXiv 2307.09288: §3.1 SFT, §3.2.2 reward models, §3.2.3 and appendix A.3.3 for RLHF


def test_the_published_figures_of_sft(recipe: RunConfig) -> None:
    sft = recipe.sft
    assert (sft.epochs, sft.batch_size, sft.max_length, sft.packing) == (2, 64, 4096, True)
    assert (sft.optim.lr, sft.optim.weight_decay, sft.optim.schedule) == (2e-5, 0.1, "cosine")


def test_the_published_figures_of_the_reward_models(recipe: RunConfig) -> None:
    reward, optim = recipe.reward, recipe.reward.optim
    assert (reward.epochs, reward.batch_size) == (1, 512)
    assert (optim.lr, optim.schedule, optim.min_lr_ratio) == (1e-5, "cosine", 0.1)
    assert (optim.warmup_ratio, optim.min_warmup_steps) == (0.03, 5)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.95, 1e-5, 0.1)
    mixtures = {name: (model.own_tag, model.other_fraction) for name, model in reward.models.items()}
    assert mixtures == {"helpfulness": ("helpful", 0.5), "safety": ("safety", 0.1)}


def test_the_published_figures_of_ppo(recipe: RunConfig) -> None:
    ppo, optim = recipe.ppo, recipe.ppo.optim
    assert 200 <= ppo.iterations <= 400
    assert (ppo.batch_size, ppo.minibatch_size, ppo.epochs) == (512, 64, 1)
    assert (ppo.clip_range, ppo.kl_coef, ppo.safety_threshold, ppo.whiten_rewards) == (0.2, 0.01, 0.15, True)
    assert (optim.lr, optim.schedule, optim.weight_decay, optim.max_grad_norm) == (1e-6, "constant", 0.1, 1.0)
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-5)


def test_what_was_never_published_is_marked_as_ours() -> None:
    lines = (CONFIGS / "stage/llama2-chat.yaml").read_text().splitlines()
    ours = {line.split(":")[0].strip() for line in lines if line.endswith("# [O]")}
    assert {"gamma", "gae_lambda", "temperature", "max_new_tokens", "warmup_ratio", "lr"} <= ours
