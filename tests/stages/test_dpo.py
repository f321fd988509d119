"""DPO on a small run: its loss, its reference, what is learned and saved, and what may not change it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.score import score
from rlhf.chat import format_of
from rlhf.data import load_preferences
from rlhf.errors import UserError
from rlhf.runs import artifacts
from rlhf.runs.context import Progress, StageContext
from rlhf.tracking import NullTracker, read_metrics
from stages import dpo

pytestmark = pytest.mark.integration

OWN = (
    "--pipeline",
    "[sft, dpo]",
    "--dpo",
    "{beta: 0.2, epochs: 3, batch_size: 32, micro_batch_size: 16, max_length: 256}",
)
OWN += ("--dpo.optim.lr", "1e-3", "--dpo.evals", "2", "--dpo.checkpoints", "1")
LORA = ("--model.lora", "{rank: 4, alpha: 8}", "--dpo.optim.lr", "1e-2")


@pytest.fixture(scope="module")
def trained(run, beside, make_stage):
    config = beside(run("sft"), *OWN)
    make_stage(config, "dpo")
    return config


@pytest.fixture(scope="module")
def lora_trained(lora_run, beside, make_stage):
    config = beside(lora_run("sft"), *OWN, *LORA)
    make_stage(config, "dpo")
    return config


@pytest.fixture(params=["whole", "lora"])
def either(request, trained, lora_trained):
    return trained if request.param == "whole" else lora_trained


def artifact(config, stage="dpo"):
    return config.folder / stage / "artifact"


def response_logprob(model, tokenizer, row, side):
    """log p of a response with nothing but transformers, one text alone."""
    chat = format_of(tokenizer)
    prompt, ids = chat.encode_prompt(row.prompt), chat.encode_response(row.prompt, getattr(row, side))
    assert ids[: len(prompt)] == prompt and ids[-1] == tokenizer.eos_token_id
    logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return sum(logprobs[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


def gap(policy, reference, tokenizer, row):
    """β · (the log ratio of the chosen response less that of the rejected one)."""
    ratios = []
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            frozen = response_logprob(reference, tokenizer, row, side)
        ratios.append(response_logprob(policy, tokenizer, row, side) - frozen)
    return 0.2 * (ratios[0] - ratios[1])


def models(config):
    """The trained policy, its reference and the tokenizer, as transformers loads them."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(artifact(config, stage)) for stage in ("dpo", "sft"))
    return policy, reference, AutoTokenizer.from_pretrained(artifact(config))


def context_of(config, tmp_path):
    inputs = {"sft": artifacts.load(artifact(config, "sft"))}
    progress = Progress(tmp_path, False)
    return StageContext("dpo", 0, 1, torch.device("cpu"), tmp_path, inputs, NullTracker(), progress, True)


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_a_policy_that_is_its_reference(either):
    (step, first), *later = read_metrics(either.folder / "dpo")["dpo/loss"]
    assert (step, first) == (1, pytest.approx(math.log(2), abs=1e-6))
    assert later[-1][1] < first - 0.02


def test_loss_and_gradient_are_those_of_the_equation(trained, tmp_path):
    """-log σ(β · gap), mean over pairs, against plain transformers and autograd."""
    policy, reference, tokenizer = models(trained)
    rows = load_preferences(trained).train[:6]
    losses = torch.stack([-logsigmoid(gap(policy, reference, tokenizer, row)) for row in rows])
    losses.mean().backward()

    pairs = dpo.encode_pairs(tokenizer, rows, 256)
    columns = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    data = dpo.Dataset.from_list(columns)
    trainer: Any = dpo.open_trainer(trained, context_of(trained, tmp_path), tokenizer, data, 1)
    trainer.model.load_state_dict(policy.state_dict())
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(columns))
    loss.backward()
    assert loss.item() == pytest.approx(losses.mean().item(), abs=1e-5) and losses.mean() < 0.6
    expected = dict(policy.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-5, rtol=1e-3)
    assert all(parameter.grad is None for parameter in trainer.ref_model.parameters())


@torch.no_grad()
def test_held_out_figures_are_what_plain_transformers_measures(either, metrics):
    """Of policy and SFT model, in every pair, whatever the order in which they were read."""
    policy, reference, tokenizer = models(either)
    gaps = [float(gap(policy, reference, tokenizer, row)) for row in load_preferences(either).held_out]
    told = metrics(artifact(either))
    assert told["loss"] == pytest.approx(sum(math.log1p(math.exp(-g)) for g in gaps) / len(gaps), abs=1e-4)
    assert told["accuracy"]["value"] == sum(g > 0 for g in gaps) / len(gaps)
    assert told["accuracy"]["n"] == len(gaps) == 32


def test_in_bf16_logprobs_stay_float32(run, beside, make_stage, metrics):
    """The reward of a response is a small difference of large sums, which bf16 would round to nothing."""
    config = beside(run("sft"), *OWN, "--hardware.precision", "bf16", "--dpo.epochs", "0.25")
    make_stage(config, "sft")
    folder = make_stage(config, "dpo")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert metrics(folder)["ties"]["value"] == 0
    ((_, logprob),) = read_metrics(folder.parent)["dpo/logprob_chosen"]
    assert logprob != torch.tensor(logprob).bfloat16().item()


@torch.no_grad()
def test_the_policy_scores_pairs_by_how_far_it_has_moved(trained, tmp_path):
    """`rlhf score`: a margin is the gap of a pair. Without its SFT model the policy has no score."""
    rows = load_preferences(trained).held_out[:5]
    messages = [[{"role": m.role, "content": m.content} for m in row.prompt] for row in rows]
    lines = [
        {"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected, "rating": "better", "tag": row.tag}
        for prompt, row in zip(messages, rows, strict=True)
    ]
    file, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = score(str(trained.folder / "dpo"), str(file), str(out), 4, "float32", "refuse")
    policy, reference, tokenizer = models(trained)
    expected = [float(gap(policy, reference, tokenizer, row)) for row in rows]
    assert [line["margin"] for line in scored] == pytest.approx(expected, abs=1e-4)
    ratio = response_logprob(policy, tokenizer, rows[0], "chosen")
    ratio -= response_logprob(reference, tokenizer, rows[0], "chosen")
    assert scored[0]["chosen"] == pytest.approx(0.2 * float(ratio), abs=1e-4)

    for place in ("alone/dpo", "other/dpo", "other/sft"):  # without its SFT model, and with another
        shutil.copytree(artifact(trained), tmp_path / place / "artifact")
    for run in ("alone", "other"):
        with pytest.raises(UserError, match="sft/artifact is not that model; keep both") as caught:
            score(str(tmp_path / run / "dpo"), str(file), str(out), 4, "float32", "refuse")
        assert caught.value.exit_code == 4


# --- what is learned and saved --------------------------------------------------------------------------------------


def test_held_out_pairs_come_to_be_told_apart(trained, metrics):
    told = metrics(artifact(trained))
    assert told["accuracy"]["value"] > 0.6 and told["loss"] < math.log(2) - 0.1
    series = read_metrics(trained.folder / "dpo")
    assert series["dpo/held_out_accuracy"][-1] == (12, told["accuracy"]["value"])
    assert series["dpo/held_out_loss"][-1][1] == told["loss"] < series["dpo/held_out_loss"][0][1]
    assert {"dpo/margin", "dpo/reward_chosen", "dpo/reward_rejected", "dpo/lr", "dpo/grad_norm"} <= series.keys()


def test_lora_is_saved_merged_and_as_one_adapter(lora_trained):
    folder = artifact(lora_trained)
    tokens = torch.randint(4, 500, (1, 9))
    merged, base, _ = models(lora_trained)
    before = base(tokens).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (merged(tokens).logits - before).abs().max() > 0.01
    names = load_file(folder / "adapter/adapter_model.safetensors")
    assert all(".ref." not in name for name in names) and len(names) == 2 * 2 * 7


# --- what changes nothing -------------------------------------------------------------------------------------------


def test_the_size_of_micro_batches_changes_no_weight(trained, run, beside, make_stage):
    config = beside(run("sft"), *OWN, "--dpo.micro_batch_size", "4")
    weights = load_file(make_stage(config, "dpo") / "model.safetensors")
    for name, tensor in load_file(artifact(trained) / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=0)
    losses = [[value for _, value in read_metrics(c.folder / "dpo")["dpo/loss"]] for c in (config, trained)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_an_interrupted_stage_ends_with_the_same_weights(
    kind, request, run, lora_run, beside, make_stage, interrupted, monkeypatch
):
    whole = kind == "whole"
    expected = request.getfixturevalue("trained" if whole else "lora_trained")
    config = beside((run if whole else lora_run)("sft"), *OWN, *(() if whole else LORA))
    on_step_end = dpo.Reporter.on_step_end

    def fail(self, args, state, control, **rest):
        if state.global_step == 11:
            raise interrupted
        on_step_end(self, args, state, control, **rest)

    monkeypatch.setattr(dpo.Reporter, "on_step_end", fail)
    with pytest.raises(interrupted):
        make_stage(config, "dpo")
    monkeypatch.undo()
    assert list((config.folder / "dpo/checkpoints").glob("checkpoint-6"))
    folder = make_stage(config, "dpo")
    files = ["model.safetensors"] if whole else ["model.safetensors", "adapter/adapter_model.safetensors"]
    for file in files:
        weights = load_file(folder / file)
        for name, tensor in load_file(artifact(expected) / file).items():
            assert torch.equal(weights[name], tensor), name
    assert artifacts.load(folder).metrics == artifacts.load(artifact(expected)).metrics


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_over_the_length_are_left_out_and_none_is_cut(trained):
    tokenizer = AutoTokenizer.from_pretrained(artifact(trained))
    row = load_preferences(trained).train[0]
    ids = format_of(tokenizer).encode_response(row.prompt, row.chosen)
    short, long = replace(row, rejected="no"), replace(row, rejected="word " * 99)
    (pair,) = dpo.encode_pairs(tokenizer, [long, short], len(ids))
    assert (pair.row, pair.prompt + pair.chosen, pair.length) == (short, ids, len(ids))
    assert tokenizer.decode(pair.rejected).strip() == "no </s>"
    with pytest.raises(UserError, match="all 2 preferences are over 9 tokens; raise dpo.max_length") as caught:
        dpo.encode_pairs(tokenizer, [long, short], 9)
    assert caught.value.exit_code == 3
