"""The plan of three small shapes against the bytes of tensors that were counted in every phase, in one process and in each
of two under ZeRO-3, for which this file is the program: `test_measured.py FOLDER`."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config import RunConfig
from rlhf.models import ScalarModel, save_causal
from rlhf.models.tiny import train_tokenizer
from rlhf.planning import Machine, plan_run, shape_of
from tests.rlhf.planning import measured
from tests.worker_group import leave, run_ranks

pytestmark = pytest.mark.integration
TOLERANCE = 0.15
SHAPES = {  # large embeddings; the layers of 13B, each width by 100; few key heads
    "wide table": {"vocab_size": 4000, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2},
    "13B by 100": {"hidden_size": 48, "intermediate_size": 138, "num_hidden_layers": 40, "vocab_size": 320},
    "grouped": {"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 3, "num_key_value_heads": 2},
}
PPO = {"batch_size": 16, "minibatch_size": 16, "micro_batch_size": 4, "max_prompt_length": 48}
PPO |= {"sampling": {"max_new_tokens": 32, "batch_size": 8}}
RUNS = [  # shape, precision, recomputation
    ("13B by 100", "bf16", True),
    ("wide table", "float32", False),
    ("grouped", "bf16", False),
    ("grouped", "float32", True),
]


RANKS = 2
UNDER_ZERO_3 = [
    ("grouped", "float32", True),
    pytest.param(("13B by 100", "float32", True), marks=[pytest.mark.proof, pytest.mark.timeout(600)]),
]


def config_of(shape, precision, recompute, folder, workers=1):
    model = {"path": str(folder / shape / "sft"), "gradient_checkpointing": recompute}
    data = {role: {"train": []} for role in ("demonstrations", "preferences", "prompts")}
    hardware = {"precision": precision, "workers": workers, "workers_per_reward_model": 1}
    given = {"name": "x", "data": data, "model": model, "hardware": hardware, "ppo": PPO}
    return RunConfig.model_validate(given)


def folders_of(shape, folder):
    return {name: folder / shape / name for name in ("sft", "helpfulness", "safety")} | {"out": folder / "out"}


def make_models(folder, own):
    given = {"vocab_size": 400, "num_attention_heads": 4, "max_position_embeddings": 4096} | own
    tokenizer = train_tokenizer(["one two three"] * 4, 300)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        causal = LlamaForCausalLM(LlamaConfig(**given | ids | {"pad_token_id": tokenizer.pad_token_id}))
        save_causal(causal, folder / "sft", tokenizer)
        for name in ("helpfulness", "safety"):
            head_1H = torch.randn(1, causal.config.hidden_size)
            ScalarModel(causal.base_model, head_1H).save(folder / name, tokenizer)


def planned(config, local=True):
    """Phase → bytes of a worker, with the model that is written while saving."""
    shape = shape_of(config.model)
    assert shape is not None
    ppo = plan_run(config, shape, Machine("x", 0, 0.0, 1e12), local).stages[-1]
    unseen = ("packed weights", "process", "file")
    return {
        phase.name: sum(
            part.bytes
            for part in (*phase.device, *(phase.host if phase.name == "saving" else ()))
            if part.kind not in unseen
        )
        for phase in ppo.phases
    }


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_what_is_planned_is_what_was_counted(run, tmp_path):
    shape, precision, recompute = run
    config = config_of(shape, precision, recompute, tmp_path)
    make_models(tmp_path / shape, SHAPES[shape])
    theirs, ours = measured.peaks(config, folders_of(shape, tmp_path)), planned(config)
    check(ours, theirs)


@pytest.mark.parametrize("run", UNDER_ZERO_3, ids=lambda run: run[0])
def test_each_of_two_ranks_under_zero_3_holds_what_is_planned(run, tmp_path):
    shape, precision, recompute = run
    make_models(tmp_path / shape, SHAPES[shape])
    (tmp_path / "run.json").write_text(json.dumps(run))
    run_ranks(__file__, tmp_path, RANKS)
    ours = planned(config_of(shape, precision, recompute, tmp_path, RANKS), local=False)
    for rank in range(RANKS):
        check(ours, json.loads((tmp_path / f"peaks-{rank}.json").read_text()))


def check(ours, theirs):
    ratios = {phase: round(ours[phase] / theirs[phase], 3) for phase in measured.PHASES}
    assert all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values()), (ratios, ours, theirs)


def as_rank(folder):
    torch.distributed.init_process_group("gloo")
    shape, precision, recompute = json.loads((folder / "run.json").read_text())
    config = config_of(shape, precision, recompute, folder, RANKS)
    found = measured.peaks(config, folders_of(shape, folder), local=False)
    (folder / f"peaks-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
