"""PPO stops before its first step where a part is broken, and raises alarms while it runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from launch import cli
from rlhf.distributed.engine import LocalEngine
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler, in_process
from rlhf.models import load_scalar, load_tokenizer, scalar
from rlhf.models.slices import States
from rlhf.ppo import models, preflight_checks, trainer
from rlhf.runs import checkpoint
from rlhf.runs.context import read_progress
from tests.stages.ppo_runs import ALL_BUT_PPO, assert_same_weights, series

pytestmark = pytest.mark.integration


# --- checks before the first step -----------------------------------------------------------------------------------


def tags(config):
    """All tags of the stage; of one that was set again, the last value."""
    lines = (config.folder / "ppo/events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "tags"]
    return {name: value for event in events for name, value in event["values"].items()}


CHECKS = ["first_ratio", "policy_is_reference", "eos_in_mask", "sampler_weights"]


def test_passed_checks_are_recorded_and_no_alarm_sounds(run, metrics):
    config = run("ppo")
    recorded = {name: value for name, value in tags(config).items() if name.startswith(("check.", "alarm."))}
    names = [*CHECKS, "score.helpfulness", "score.safety"]
    assert recorded.keys() >= {f"check.{name}" for name in names}
    assert all(value.startswith("passed: ") for name, value in recorded.items() if name.startswith("check."))
    assert not any(name.startswith("alarm.") for name in recorded)
    assert metrics(config.folder / "ppo/artifact")["alarms"] == []


def scored_off_temperature(patch):
    score: Any = preflight_checks.score_responses

    def colder(*given):
        *others, settings = given
        colder = settings.sampling.model_copy(update={"temperature": 0.9})
        return score(*others, settings.model_copy(update={"sampling": colder}))

    patch.setattr(preflight_checks, "score_responses", colder)


def another_reference(patch):
    """The second model that is loaded."""
    loaded, load = [], models.load_causal

    def other(*given, **named):
        model = load(*given, **named)
        loaded.append(model)
        if len(loaded) == 2:
            model.lm_head.weight.data *= 1.001
        return model

    patch.setattr(models, "load_causal", other)


def eos_masked_out(patch):
    sample = InProcessSampler.sample

    def without_eos(self, *given, **named):
        rollout = sample(self, *given, **named)
        R = rollout.response_mask_BR.shape[1]
        rollout.response_mask_BR[rollout.tokens_BT[:, -R:] == self.stop_ids[0]] = False
        return rollout

    patch.setattr(InProcessSampler, "sample", without_eos)


def sync_of_rounded_weights(patch):
    load = InProcessSampler.load_weights
    rounded = lambda self, named: load(self, ((name, tensor.bfloat16()) for name, tensor in named))
    patch.setattr(InProcessSampler, "load_weights", rounded)


def another_score_head(patch):
    load = models.load_scalar

    def other(*given, **named):
        model = load(*given, **named)
        model.head.weight.data += 0.05
        return model

    patch.setattr(models, "load_scalar", other)


def positions_that_count_padding(patch):
    def read_states(model, tokens_BT, mask_BT, packing, response_length):
        hidden_BTH = model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        place_BT = torch.arange(tokens_BT.numel()).view_as(tokens_BT).masked_fill(~mask_BT, -1)
        return States(hidden_BTH.flatten(0, 1), place_BT, None)

    patch.setattr(scalar, "read_states", read_states)


@pytest.mark.parametrize(
    ("name", "sabotage"),
    [
        ("first_ratio", scored_off_temperature),
        ("policy_is_reference", another_reference),
        ("eos_in_mask", eos_masked_out),
        ("sampler_weights", sync_of_rounded_weights),
        ("score.safety", another_score_head),
        ("score.helpfulness", positions_that_count_padding),
    ],
)
def test_a_broken_part_stops_the_stage_before_its_first_step(run, beside, make_stage, monkeypatch, name, sabotage):
    config = beside(run(ALL_BUT_PPO), "--ppo.sampling.max_new_tokens", "64")
    sabotage(monkeypatch)
    with pytest.raises(UserError, match=f"(?m)^{name}: .*, at most .* is allowed. ") as caught:
        make_stage(config, "ppo")
    assert caught.value.exit_code == 6
    assert series(config) == {}


def test_a_row_for_which_there_is_no_memory_is_refused_before_the_first_step(run, beside, make_stage, monkeypatch):
    config = beside(run(ALL_BUT_PPO))
    monkeypatch.setattr(in_process, "free_bytes", lambda *_: 20_000)
    with pytest.raises(UserError, match="GB for them, enough for [0-9]+ tokens: lower ppo.max_prompt_length") as caught:
        make_stage(config, "ppo")
    assert caught.value.exit_code == 5
    assert series(config) == {}


def test_the_score_of_the_fixed_text_is_that_of_rlhf_score(run, tmp_path):
    folder = run(ALL_BUT_PPO).folder / "reward/safety/artifact"
    prompt, answer = preflight_checks.FIXED_TEXT
    row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], "tag": "safety"}
    (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main(["score", str(folder), str(tmp_path / "row.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    told = json.loads((tmp_path / "out.jsonl").read_text())["score"]
    engine = LocalEngine(load_scalar(folder), None, 1, run("sft").hardware)
    scores = preflight_checks.fixed_text_scores(engine, load_tokenizer(folder))
    assert list(scores.values()) == pytest.approx([told] * 3, abs=1e-5)


# --- alarms ---------------------------------------------------------------------------------------------------------


def test_a_training_that_explodes_stops_and_keeps_its_checkpoints(run, beside, make_stage):
    config = beside(run(ALL_BUT_PPO), "--ppo.critic_optim", "{lr: 1e30}", "--ppo.iterations", "9")
    with pytest.raises(UserError, match=r"iteration \d: .*ppo/\w+ is (nan|inf).*critic_optim.lr") as caught:
        make_stage(config, "ppo")
    assert caught.value.exit_code == 6
    last = max(step for points in series(config).values() for step, _ in points)
    whole = checkpoint.complete(config.folder / "ppo/checkpoints")
    assert [path.name for path in whole] == [f"iteration-{step:06d}" for step in range(max(1, last - 2), last)]


def drifting_sampler(patch):
    """After the checks, which the sync before the first iteration follows."""
    sync, count = trainer.sync_weights, []

    def drift(policy, sampler):
        moved = sync(policy, sampler)
        count.append(1)
        if len(count) > 1:
            sampler.model.lm_head.weight.data *= 3
        return moved

    patch.setattr(trainer, "sync_weights", drift)


def sharpening_policy(patch):
    """Entropy falls after the first iteration, whatever the updates do."""
    update = trainer.update

    def sharpen(policy, *others):
        metrics = update(policy, *others)
        policy.module.causal.lm_head.weight.data *= 4
        return metrics

    patch.setattr(trainer, "update", sharpen)


@pytest.mark.parametrize(
    ("name", "overrides", "sabotage"),
    [
        ("kl", ["--ppo.optim", "{lr: 0.3}"], None),
        ("entropy", ["--ppo.alarms.entropy_ratio_min", "0.9"], sharpening_policy),
        ("eos_rate", ["--ppo.sampling.max_new_tokens", "1"], None),
        ("rollout_logprob_diff", [], drifting_sampler),
    ],
)
def test_an_alarm_becomes_a_tag_a_warning_and_a_line_of_the_manifest(
    run, beside, make_stage, metrics, monkeypatch, name, overrides, sabotage
):
    config = beside(run(ALL_BUT_PPO), "--ppo.alarms.kl_max", "5", *overrides)
    if sabotage:
        sabotage(monkeypatch)
    artifact = make_stage(config, "ppo")
    entry = next(entry for entry in metrics(artifact)["alarms"] if entry["name"] == name)
    text = f"iteration {entry['first']}: {entry['text']}"
    assert tags(config)[f"alarm.{name}"] == text
    state = read_progress(config.folder / "ppo")
    assert state is not None and text in state.warnings
    assert 1 <= entry["iterations"] <= 2


def test_an_alarm_can_stop_the_stage_which_goes_on_when_its_limit_is_raised(run, beside, make_stage):
    config = beside(run(ALL_BUT_PPO), "--ppo.alarms.stop", "true", "--ppo.alarms.kl_max", "0.01")
    with pytest.raises(UserError, match=r"alarm .*iteration 2: KL to the SFT model is") as caught:
        make_stage(config, "ppo")
    assert caught.value.exit_code == 6
    (first,) = checkpoint.complete(config.folder / "ppo/checkpoints")
    whole, artifact = run("ppo"), config.folder / "ppo/artifact"
    checked = []
    raised = config.model_copy(update={"ppo": config.ppo.model_copy(update={"alarms": whole.ppo.alarms})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda folder, *_: checked.append((folder, first.exists())))
        make_stage(raised, "ppo")
    assert checked == [(config.folder / "ppo/checkpoints", True)]  # the second iteration alone was made
    assert_same_weights(artifact, whole.folder / "ppo/artifact")
