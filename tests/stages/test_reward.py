"""Reward models on a small run: their loss, their centre, and what other tools read."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_data import Message, Preference
from rlhf.chat import format_of
from rlhf.data import MARGINS, draw_rows, load_demonstrations, load_preferences, mix_preferences
from rlhf.models import load_scalar
from rlhf.runs.context import Progress, StageContext, read_progress
from rlhf.tracking import NullTracker, read_metrics
from stages import reward

pytestmark = pytest.mark.integration

NAMES = ("helpfulness", "safety")


@pytest.fixture(params=NAMES)
def trained(request, run):
    """(name, config, artifact) of each reward model."""
    config = run(f"reward/{request.param}")
    return request.param, config, config.folder / "reward" / request.param / "artifact"


@torch.no_grad()
def plain_scores(folder, sequences):
    """Logits of plain transformers less `reward_offset`, one sequence after the other."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return [float(model(torch.tensor([ids])).logits) - model.config.reward_offset for ids in sequences]


def test_the_last_figure_shown_is_the_accuracy_on_held_out_pairs(trained, metrics):
    _, _, folder = trained
    state = read_progress(folder.parent)
    assert state is not None
    assert state.metrics["held out accuracy"] == pytest.approx(metrics(folder)["accuracy"]["value"])


# --- what is saved --------------------------------------------------------------------------------------------------


def test_other_tools_read_the_same_scores(trained):
    _, config, folder = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        format_of(tokenizer).encode_response(row.prompt, row.chosen) for row in load_preferences(config).held_out[:6]
    ]
    model = load_scalar(folder)
    ours = [float(model.score(torch.tensor([ids]), torch.ones(1, len(ids)).bool())) for ids in rows]
    assert ours == pytest.approx(plain_scores(folder, rows), abs=1e-5)
    assert len({round(score, 6) for score in ours}) == 6


def test_sft_answers_average_zero(trained, metrics):
    _, config, folder = trained
    tokenizer, split = AutoTokenizer.from_pretrained(folder), load_demonstrations(config)
    answers, _ = draw_rows([*split.held_out, *split.train], 32, config.seed)
    rows = [format_of(tokenizer).encode(row.messages)[0] for row in answers]
    scores = plain_scores(folder, rows)
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-5)
    assert metrics(folder)["offset"] != 0


def test_the_two_models_are_not_the_same(run):
    folder = run("reward/safety").folder / "reward"
    heads = [load_file(folder / name / "artifact/model.safetensors")["score.weight"] for name in NAMES]
    assert (heads[0] - heads[1]).abs().max() > 1e-4


def test_lora_is_saved_merged_and_as_an_adapter(lora_run):
    config = lora_run("reward/helpfulness")
    folder = config.folder / "reward/helpfulness/artifact"
    tokens = torch.randint(4, 500, (1, 9))
    merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    base = AutoModelForSequenceClassification.from_pretrained(config.folder / "sft/artifact", num_labels=1).eval()
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-5, rtol=1e-4)
    assert merged(tokens).logits.abs().max() > 0


def test_in_bf16_weights_and_head_stay_float32(run, beside, make_stage, metrics):
    config = beside(run("sft"), "--hardware.precision", "bf16")
    make_stage(config, "sft")
    folder = make_stage(config, "reward/helpfulness")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    # a bfloat16 score has 8 bits: a hundred of them would often be equal
    assert metrics(folder)["ties"]["value"] == 0


# --- what is learned ------------------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_a_head_of_zeros(run, settings, make_stage, beside):
    """Every gap is 0: -log σ(-margin), and ln 2 for each side that is known to be safe or unsafe, over all sides."""
    for name in NAMES:
        given = run("sft")
        model = given.reward.models[name]
        rows = mix_preferences(load_preferences(given).train, model, given.seed)
        whole = f"{{batch_size: {len(rows)}, micro_batch_size: {len(rows)}, checkpoints: 0, epochs: 1}}"
        config = beside(given, "--reward", whole)
        make_stage(config, f"reward/{name}")
        margins = [MARGINS["small"][row.rating] for row in rows]
        expected = sum(math.log(1 + math.exp(margin)) for margin in margins) / len(rows)
        known = [side != "unknown" for row in rows for side in (row.chosen_safety, row.rejected_safety)]
        expected += model.safety_loss_weight * math.log(2) * sum(known) / len(known)
        ((step, first),) = read_metrics(config.folder / "reward" / name)["reward/loss"]
        assert (step, first) == (1, pytest.approx(expected, abs=1e-4))
    assert sum(known) > 0  # the safety model has an auxiliary loss to speak of


def test_training_pairs_come_to_be_told_apart(run):
    series = read_metrics(run("reward/helpfulness").folder / "reward/helpfulness")
    assert series["reward/accuracy"][-1][1] > 0.7
    assert series["reward/margin"][-1][1] > 0
    assert len(series["reward/held_out_accuracy"]) == 1
    assert {"reward/lr", "reward/grad_norm", "reward/mean"} <= series.keys()


def test_the_size_of_micro_batches_changes_no_weight(run, beside, make_stage):
    weights = []
    for size in (4, 32):
        config = beside(run("sft"), "--reward.micro_batch_size", str(size))
        weights.append(load_file(make_stage(config, "reward/safety") / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-4, rtol=0)


def test_an_interrupted_stage_ends_with_the_same_weights(run, beside, make_stage, interrupted, monkeypatch, metrics):
    config = beside(run("sft"))
    expected = run("reward/helpfulness").folder / "reward/helpfulness/artifact"
    steps = metrics(expected)["steps"]
    on_step_end = reward.Reporter.on_step_end

    def fail(self, args, state, control, **rest):
        if state.global_step == steps - 1:
            raise interrupted
        on_step_end(self, args, state, control, **rest)

    monkeypatch.setattr(reward.Reporter, "on_step_end", fail)
    with pytest.raises(interrupted):
        make_stage(config, "reward/helpfulness")
    monkeypatch.undo()
    assert list((config.folder / "reward/helpfulness/checkpoints").glob("checkpoint-*"))
    weights = load_file(make_stage(config, "reward/helpfulness") / "model.safetensors")
    for name, tensor in load_file(expected / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name


# --- held-out pairs -------------------------------------------------------------------------------------------------


def test_accuracy_is_of_the_own_tag_and_also_told_for_both(run):
    tokenizer = AutoTokenizer.from_pretrained(run("sft").folder / "sft/artifact")

    def pair(number, tag, chosen, rejected):
        prompt = (Message("user", f"question {number}"),)
        return Preference(prompt, chosen, rejected, "better", tag, "unknown", "unknown", f"x:{number}")

    # the judge likes length: right on both helpful pairs, wrong on the safety pair
    rows = [
        pair(1, "helpful", "a long answer", "no"),
        pair(2, "helpful", "a longer answer still", "yes"),
        pair(3, "safety", "no", "here is how it is done"),
        pair(4, "helpful", "far too long " * 99, "no"),  # over the length: left out
    ]
    held_out = reward.HeldOut(tokenizer, rows, "safety", 128)
    scores = held_out.score(lambda sequences: [float(len(ids)) for ids in sequences])
    report, kept = held_out.report(scores), held_out.rows_by_pair(scores)
    assert [row["accuracy"] for row in kept] == [0.0]
    assert report["accuracy"]["value"] == 0.0 and report["accuracy"]["n"] == 1
    assert report["by_tag"]["helpful"]["value"] == 1.0 and report["by_tag"]["helpful"]["n"] == 2
    assert report["by_tag"]["safety"]["value"] == 0.0


@torch.no_grad()
def test_scores_stand_in_the_order_of_their_rows(run, tmp_path):
    config = run("reward/helpfulness")
    folder = config.folder / "reward/helpfulness/artifact"
    model, tokenizer = load_scalar(folder), AutoTokenizer.from_pretrained(folder)
    rows = [
        format_of(tokenizer).encode_response(row.prompt, row.chosen) for row in load_preferences(config).held_out[:7]
    ]
    context = StageContext(
        "reward/helpfulness", 0, 1, torch.device("cpu"), tmp_path, {}, NullTracker(), Progress(tmp_path, False), True
    )
    settings = config.model_copy(update={"reward": config.reward.model_copy(update={"micro_batch_size": 3})})
    scorer = reward.PairScorer(model)
    scorer.train()
    scores = reward.score_all(scorer, rows, settings, context, tokenizer.pad_token_id)
    assert [s - model.offset for s in scores] == pytest.approx(plain_scores(folder, rows), abs=1e-5)
    assert scorer.training  # as it was
