"""SFT on a small model: what is learned, what is saved, and what may not change it."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.chat import format_of
from rlhf.config import SFTConfig
from rlhf.data import load_demonstrations
from rlhf.errors import UserError
from rlhf.tracking import read_metrics
from stages import sft

pytestmark = pytest.mark.integration


def assert_same_weights(folder, other, atol):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@torch.no_grad()
def held_out_loss(folder, config):
    """-log p per answer token with nothing but transformers, one dialogue after the other."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in load_demonstrations(config).held_out:
        ids, mask = format_of(tokenizer).encode(row.messages)
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        picked = [-float(logprobs[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t]]
        total, count = total + sum(picked), count + len(picked)
    return total / count


# --- what is learned ------------------------------------------------------------------------------------------------


def test_the_held_out_loss_falls_and_is_what_plain_transformers_measures(run, metrics):
    config = run("sft")
    told = metrics(config.folder / "sft/artifact")["held_out_loss"]
    assert told == pytest.approx(held_out_loss(config.folder / "sft/artifact", config), abs=1e-3)
    untrained = held_out_loss(config.folder / "base", config)
    assert untrained == pytest.approx(math.log(512), abs=0.3)
    assert told < untrained - 1


def test_figures_of_every_step_and_of_the_held_out_rows(run):
    series = read_metrics(run("sft").folder / "sft")
    steps = [step for step, _ in series["sft/loss"]]
    assert steps == list(range(1, len(steps) + 1))
    assert series["sft/loss"][-1][1] < series["sft/loss"][0][1] - 1
    assert len(series["sft/held_out_loss"]) == 1
    assert {"sft/lr", "sft/grad_norm"} <= series.keys()


# --- what is saved --------------------------------------------------------------------------------------------------


def test_the_artifact_is_an_ordinary_folder(run):
    folder = run("sft").folder / "sft/artifact"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert all(p.dtype == torch.float32 for p in model.parameters())
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<s>[INST] hi [/INST]"


def test_lora_is_saved_merged_and_as_an_adapter(lora_run):
    config = lora_run("sft")
    folder = config.folder / "sft/artifact"
    tokens = torch.randint(4, 500, (2, 9))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(config.folder / "base")
    before = base(tokens).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (merged(tokens).logits - before).abs().max() > 0.01


# --- what changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_size_of_micro_batches_changes_no_weight(settings, make_stage, packing):
    """The loss is divided by the tokens of the whole batch, not by those of each micro-batch."""
    own = ["--sft.packing", packing, "--sft.epochs", "1", "--sft.micro_batch_size"]
    folders = [make_stage(settings(*own, str(size)), "sft") for size in (1, 4)]
    assert_same_weights(*folders, atol=2e-4)


def test_an_interrupted_stage_ends_with_the_same_weights(run, settings, make_stage, interrupted, monkeypatch, metrics):
    config = settings()
    steps = metrics(run("sft").folder / "sft/artifact")["steps"]
    on_step_end = sft.Reporter.on_step_end

    def fail(self, args, state, control, **rest):
        if state.global_step == steps - 2:
            raise interrupted
        on_step_end(self, args, state, control, **rest)

    monkeypatch.setattr(sft.Reporter, "on_step_end", fail)
    with pytest.raises(interrupted):
        make_stage(config, "sft")
    monkeypatch.undo()
    before = read_metrics(config.folder / "sft")["sft/loss"]
    assert_same_weights(make_stage(config, "sft"), run("sft").folder / "sft/artifact", atol=0)
    after = read_metrics(config.folder / "sft")["sft/loss"]
    assert after[: len(before)] == before  # and the first half was not done again with other figures


def test_every_step_is_of_one_whole_batch(settings, make_stage, metrics, monkeypatch):
    """Of a rest of rows a Trainer makes a step too, in which each of them weighs more."""
    rows, compute_loss = Counter(), sft.Trainer.compute_loss

    def count(self, model, inputs, *arguments, **settings):
        rows[self.state.global_step] += len(inputs["input_ids"])
        return compute_loss(self, model, inputs, *arguments, **settings)

    monkeypatch.setattr(sft.Trainer, "compute_loss", count)
    own = ["--sft.packing", "false", "--sft.batch_size", "48", "--sft.epochs", "2", "--sft.micro_batch_size", "16"]
    assert metrics(make_stage(settings(*own), "sft"))["steps"] == 2 * 2  # of 128 rows
    assert list(rows.values()) == [48] * 4


def test_less_than_one_batch_is_refused(settings, make_stage):
    config = settings("--sft.packing", "false", "--sft.batch_size", "256")
    with pytest.raises(
        UserError, match=r"sft: 128 training rows are less than one batch; lower sft.batch_size \(256\)"
    ):
        make_stage(config, "sft")


def test_less_than_one_batch_of_packed_rows_is_not_told_as_rows_of_the_file(settings, make_stage):
    config = settings("--sft.packing", "true", "--sft.batch_size", "256")
    with pytest.raises(UserError, match=r"packed rows of several texts .*\(256\), or set sft.packing to false"):
        make_stage(config, "sft")


def test_rows_of_which_packing_would_leave_less_than_one_batch_are_not_packed(settings, make_stage, metrics, caplog):
    config = settings(
        "--sft.packing", "true", "--sft.batch_size", "64", "--sft.micro_batch_size", "32", "--sft.epochs", "1"
    )
    assert metrics(make_stage(config, "sft"))["steps"] == 2  # of 128 rows
    assert "less than one batch (sft.batch_size 64): they are not packed" in caplog.text


def test_checkpoints_of_a_finished_stage_are_gone(run):
    assert not (run("sft").folder / "sft/checkpoints").exists()


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(run):
    """(config, tokenizer, dialogues, the rows that SFT trains on)."""
    config = run("sft")
    tokenizer = AutoTokenizer.from_pretrained(config.folder / "sft/artifact")
    dialogues = load_demonstrations(config).train[:40]
    return config, tokenizer, dialogues, sft._labelled(sft.encode_demonstrations(tokenizer, dialogues, 256))


def test_only_answers_have_labels_and_their_eos_is_among_them(labelled):
    _, tokenizer, dialogues, rows = labelled
    for dialogue, row in zip(dialogues, rows, strict=True):
        answers = [m.content.strip() for m in dialogue.messages if m.role == "assistant"]
        said = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert [part.strip() for part in said.split("</s>")] == [*answers, ""]


def test_packed_rows_hold_every_token_once(labelled):
    _, _, _, rows = labelled
    packed = sft.pack(rows, SFTConfig(packing=True, max_length=256))
    assert len(packed) < len(rows)
    assert max(map(len, packed["input_ids"])) <= 256
    pieces = []
    for row in packed.to_list():
        ends = torch.tensor([0, *row["seq_lengths"]]).cumsum(0).tolist()
        pieces += [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in pairwise(ends)]
    assert sorted(pieces) == sorted((row["input_ids"], row["labels"]) for row in rows)


@torch.no_grad()
def test_packed_rows_do_not_see_each_other(labelled):
    config, tokenizer, _, rows = labelled
    model = AutoModelForCausalLM.from_pretrained(config.folder / "sft/artifact", attn_implementation="sdpa").eval()
    packed = sft.pack(rows, SFTConfig(packing=True, max_length=256))
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)(list(packed))
    labels = batch.pop("labels")[0]
    logprobs = torch.log_softmax(model(**batch).logits[0], -1)
    together = {}
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    for a, b in pairwise([*starts, len(labels)]):
        tokens = batch["input_ids"][0, a:b]
        together[tuple(tokens.tolist())] = logprobs[range(a, b - 1), tokens[1:]]
    assert len(together) == len({tuple(row["input_ids"]) for row in rows})
    for row in rows:
        tokens = torch.tensor(row["input_ids"])
        alone = torch.log_softmax(model(tokens[None]).logits[0], -1)[range(len(tokens) - 1), tokens[1:]]
        torch.testing.assert_close(together[tuple(row["input_ids"])], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("stage", "other"), [("sft", "ppo"), ("ppo", "sft")])
def test_a_model_whose_packed_rows_see_one_another_is_refused_before_the_first_step(
    settings, make_stage, monkeypatch, stage, other
):
    """As in families whose attention reads no positions."""

    def leaking(model, tokens_BT, mask_BT, packing=False, response_length=0):
        hidden_BTH = torch.ones(*mask_BT.shape, 4)
        return -hidden_BTH if packing else hidden_BTH

    monkeypatch.setattr("rlhf.models.pretrained.hidden_states", leaking)
    config = settings(f"--{stage}.packing", "true", f"--{other}.packing", "false")
    with pytest.raises(UserError, match=f"packed rows see one another.*{stage}.packing") as error:
        make_stage(config, "sft")
    assert error.value.exit_code == 4
    assert not [metrics for metrics in read_metrics(config.folder / "sft") if "sft/loss" in metrics]
