"""PPO on a small run: what it keeps, how it goes on after an interruption, and when it stops."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from launch import cli
from reward_data import Message, Prompt
from rlhf.config import RunConfig
from rlhf.data import load_prompts, next_prompts, split_held_out
from rlhf.data.batches import select
from rlhf.distributed.engine import LocalEngine
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler, in_process
from rlhf.models import load_causal, load_scalar, load_tokenizer, scalar
from rlhf.models.tiny import train_tokenizer
from rlhf.ppo import models, preflight_checks, trainer
from rlhf.ppo.evaluator import Evaluator
from rlhf.ppo.setup import reward_set
from rlhf.ppo.step_profiler import COMPUTING, PHASES
from rlhf.runs import checkpoint
from rlhf.runs.context import read_progress
from rlhf.tracking import read_metrics

pytestmark = pytest.mark.integration

ALL_BUT_PPO = "reward/safety"
ROLE: dict[str, Any] = {"train": []}


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def series(config):
    """All figures of the stage that do not measure time."""
    return {name: points for name, points in read_metrics(config.folder / "ppo").items() if "perf/" not in name}


def opened(config) -> Any:
    """The models of PPO, as the stage opens them."""
    context: Any = SimpleNamespace(
        inputs={"sft": SimpleNamespace(path=config.folder / "sft/artifact")}, device=torch.device("cpu"), local=True
    )
    folders = {name: config.folder / "reward" / name / "artifact" for name in ("helpfulness", "safety")}
    return models.open_models(config, context, folders)


# --- what is saved --------------------------------------------------------------------------------------------------


def test_policy_and_critic_are_ordinary_folders(run):
    folder = run("ppo").folder / "ppo/artifact"
    tokens = torch.randint(4, 500, (1, 6))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.shape == (1, 6, len(tokenizer))
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic").eval()
    last = load_scalar(folder / "critic")(tokens, torch.ones_like(tokens))[0, -1]
    torch.testing.assert_close(critic(tokens).logits[0, 0], last)


def test_the_manifest_tells_what_the_report_needs(run, metrics):
    config = run("ppo")
    told = metrics(config.folder / "ppo/artifact")
    keys = {"reward.helpfulness", "reward.safety", "gold", "kl", "length", "eos_rate", "distinct_2"}
    keys |= {"flagged.helpful", "flagged.safety"}
    for policy in ("base", "sft", "ppo"):
        assert told["held_out"][policy].keys() == keys
        assert told["held_out"][policy]["length"]["n"] == 32 - 8  # those that did not choose the policy
    assert told["iterations"] == 2
    assert 0 <= told["best_iteration"] <= 2
    _, for_report = split_held_out(load_prompts(config).held_out, 8, config.seed)
    assert [row["prompt"] for row in told["samples"]] == [prompt.messages[-1].content for prompt in for_report[:10]]


def test_nothing_of_the_way_there_is_left(run):
    assert not (run("ppo").folder / "ppo/checkpoints").exists()


@pytest.fixture(scope="module")
def lora_ppo(lora_run, make_stage):
    """A run with LoRA that keeps its last policy and critic: adapters that never moved would show nothing."""
    config = lora_run(ALL_BUT_PPO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "reward", lambda self, prompts, iteration: float(iteration))
        make_stage(config, "ppo")
    return config


def test_lora_is_saved_merged_and_as_an_adapter(lora_ppo):
    config = lora_ppo
    folder, tokens = config.folder / "ppo/artifact", torch.randint(4, 500, (2, 9))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(config.folder / "sft/artifact")
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-4, rtol=1e-4)
    assert series(config)["ppo/grad_norm"][0][1] > 0


def test_lora_adapts_the_critic_too(lora_ppo):
    """Adapters and head learn, and the folder is a whole classifier all the same."""
    config = lora_ppo
    critic = opened(config).critic.module
    learning = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    assert "head.weight" in learning and all(".lora_" in name for name in learning - {"head.weight"})
    assert len(learning) > 1 and series(config)["ppo/critic_grad_norm"][0][1] > 0
    folder, tokens = config.folder / "ppo/artifact/critic", torch.randint(4, 500, (1, 6))
    adapted = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(config.folder / "reward/helpfulness/artifact"),
        str(folder / "adapter"),
    )
    whole = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(whole.eval()(tokens).logits, adapted.eval()(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_critic_starts_from_zero(run):
    first = {name: dict(points)[1] for name, points in series(run("ppo")).items()}
    assert first["ppo/value_mean"] == 0.0
    assert first["ppo/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert first["ppo/critic_grad_norm"] > 0


# --- iterations -----------------------------------------------------------------------------------------------------


def test_the_first_iteration_starts_from_the_reference_and_the_sampler_agrees(run):
    first = {name: dict(points)[1] for name, points in series(run("ppo")).items()}
    assert first["ppo/kl"] == pytest.approx(0, abs=1e-4)
    assert first["ppo/rollout_logprob_diff_max"] < 1e-4
    assert first["ppo/grad_norm"] > 0 and first["ppo/critic_grad_norm"] > 0
    assert first["ppo/lr"] == pytest.approx(1e-3)


def test_evaluation_before_the_first_and_after_every_iteration(run):
    metrics = series(run("ppo"))
    assert [step for step, _ in metrics["eval/reward"]] == [0, 1, 2]
    assert dict(metrics["eval/kl"])[0] == pytest.approx(0, abs=1e-4)
    assert abs(dict(metrics["eval/kl"])[2]) > 1e-3  # it has moved


def test_every_second_and_every_token_of_an_iteration_is_accounted_for(run):
    config = run("ppo")
    told = {name: dict(points) for name, points in read_metrics(config.folder / "ppo").items()}
    for step in (1, 2):
        seconds = {phase: told[f"perf/seconds_{phase}"][step] for phase in PHASES}
        assert sum(seconds.values()) == pytest.approx(told["perf/seconds_iteration"][step], abs=1e-9)
        assert all(seconds[phase] > 0 for phase in PHASES)  # evaluation and checkpoint in every iteration
        assert seconds["other"] < 0.5 * sum(seconds.values())
        for phase in COMPUTING:
            of_answers = config.ppo.epochs if phase == "update" else 1
            assert told[f"perf/tokens_{phase}_useful"][step] == of_answers * told["ppo/length"][step] * 16
            assert 0 < told[f"perf/token_efficiency_{phase}"][step] < 1
            assert 0 < told[f"perf/roofline_fraction_{phase}"][step] < 1


def test_the_coefficient_of_the_kl_follows_its_target(run):
    kl_coef = dict(series(run("ppo"))["ppo/kl_coef"])
    # a KL of 0 where 0.01 is wanted: down by a fifth for 16 of 50 answers
    assert kl_coef == {1: 0.01, 2: pytest.approx(0.01 * (1 - 0.2 * 16 / 50))}


def test_prompts_come_in_a_new_order_every_time_all_have_been_drawn(run):
    config = run("ppo")
    prompts = load_prompts(config).train
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update={"batch_size": 24})})
    tokenizer = AutoTokenizer.from_pretrained(config.folder / "sft/artifact")
    drawn = [next_prompts(tokenizer, prompts, config, iteration).ids_B.tolist() for iteration in range(1, 9)]
    ids = [i for batch in drawn for i in batch]
    assert len(prompts) == 64
    epochs = [[i % 64 for i in ids[start : start + 64]] for start in (0, 64, 128)]
    assert all(Counter(epoch) == Counter(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = next_prompts(tokenizer, prompts, config, 3).ids_B.tolist()  # as after a restart
    assert again == drawn[2]


def test_a_prompt_that_is_drawn_twice_in_an_iteration_gets_two_answers(run):
    config = run("sft")
    ppo_settings = config.ppo.model_copy(update={"batch_size": 6})
    config, prompts = config.model_copy(update={"ppo": ppo_settings}), load_prompts(config).train[:3]
    folder = config.folder / "sft/artifact"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = next_prompts(tokenizer, prompts, config, iteration=2)
    sampler = InProcessSampler(load_causal(folder), [tokenizer.eos_token_id], tokenizer.pad_token_id)
    answers = sampler.sample(batch, config.ppo.sampling, config.seed, iteration=2).tokens_BT
    order = (batch.ids_B % 3).argsort(stable=True)
    assert torch.equal(batch.tokens_BP[order[::2]], batch.tokens_BP[order[1::2]])
    assert (answers[order[::2]] != answers[order[1::2]]).any(1).all()


def test_a_prompt_has_its_answers_next_to_each_other_and_each_its_own_numbers():
    prompts = [Prompt((Message("user", "hi " * (1 + i)),), ("helpful", "safety")[i % 2], f"row {i}") for i in range(9)]
    tokenizer, data = train_tokenizer(["hi"] * 9, 270), {"demonstrations": ROLE, "preferences": ROLE, "prompts": ROLE}

    def drawn(batch_size, answers):
        settings = {"batch_size": batch_size, "minibatch_size": batch_size, "group_size": answers}
        config = RunConfig.model_validate({"name": "x", "data": data, "ppo": settings})
        return [next_prompts(tokenizer, prompts, config, iteration) for iteration in (1, 2, 3, 4)]

    ids = torch.cat([batch.ids_B for batch in drawn(24, 4)])
    assert len(set(ids.tolist())) == 4 * 24
    for one, four in zip(drawn(6, 1), drawn(24, 4), strict=True):
        repeated = select(one, [i for i in range(6) for _ in range(4)])
        for name in ("tokens_BP", "mask_BP", "is_safety_B"):
            assert torch.equal(getattr(four, name), getattr(repeated, name))


def test_several_answers_to_a_prompt_share_what_is_computed_for_it(run, beside, make_stage):
    config = beside(run(ALL_BUT_PPO), "--ppo.group_size", "4", "--ppo.packing", "true")
    make_stage(config, "ppo")
    told = {name: dict(points) for name, points in read_metrics(config.folder / "ppo").items()}
    for step in (1, 2):
        assert [told[f"perf/tokens_{phase}_padded"][step] for phase in COMPUTING] == [0, 0, 0]
        assert told["perf/tokens_scoring_useful"][step] == told["ppo/length"][step] * 16
        assert (
            told["perf/tokens_sampling_useful"][step] == told["ppo/length"][step] * 16 - 12
        )  # first tokens of 4 at once
        assert told["ppo/rollout_logprob_diff_max"][step] < 1e-4
    assert told["ppo/kl"][1] == pytest.approx(0, abs=1e-4) and told["ppo/grad_norm"][2] > 0


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
def test_models_that_learn_recompute_their_activations_where_the_settings_say_so(run, wanted):
    config = run(ALL_BUT_PPO)
    config = config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": wanted})})
    found = opened(config)
    engines = [found.policy, found.critic, found.reference, *found.reward_models.values()]
    assert [recomputes(engine.module) for engine in engines] == [wanted, wanted, False, False, False]


def recomputes(module):
    """Whether the first layer runs again when gradients are asked for."""
    calls = []
    transformer = next(part for part in module.modules() if hasattr(part, "layers"))
    handle = transformer.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.arange(4, 10)[None]
    transformer(tokens).last_hidden_state.sum().requires_grad_().backward()
    handle.remove()
    return len(calls) == 2


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
    def hidden_states(model, tokens_BT, mask_BT, packing, response_length):
        return model(input_ids=tokens_BT, use_cache=False).last_hidden_state

    patch.setattr(scalar, "hidden_states", hidden_states)


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


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "name"), [(trainer, "update"), (checkpoint, "save")])
def test_an_interrupted_run_goes_on_bit_for_bit(run, beside, make_stage, interrupted, monkeypatch, place, name):
    """Broken off in the second iteration: before the models learn, and when all is done but the checkpoint."""
    whole, config = run("ppo"), beside(run(ALL_BUT_PPO))
    original = getattr(place, name)

    def fail(*arguments):
        if checkpoint.complete(config.folder / "ppo/checkpoints"):
            raise interrupted
        return original(*arguments)

    monkeypatch.setattr(place, name, fail)
    with pytest.raises(interrupted):
        make_stage(config, "ppo")
    monkeypatch.undo()
    artifact = make_stage(config, "ppo")
    assert series(config) == series(whole)
    assert_same_weights(artifact, whole.folder / "ppo/artifact")
    assert_same_weights(artifact / "critic", whole.folder / "ppo/artifact/critic")


def test_a_learning_rate_of_zero_stays_flat_and_stops_early(run, beside, make_stage, metrics):
    still = "{lr: 0}"
    config = beside(
        run(ALL_BUT_PPO),
        *("--ppo.optim", still, "--ppo.critic_optim", still, "--ppo.iterations", "9", "--ppo.patience", "2"),
    )
    artifact = make_stage(config, "ppo")
    rewards = [value for _, value in series(config)["eval/reward"]]
    assert rewards == [rewards[0]] * 3  # iterations 0, 1 and 2: no better twice, so no third
    assert all(abs(value) < 1e-4 for _, value in series(config)["ppo/kl"])
    told = metrics(artifact)
    assert (told["iterations"], told["best_iteration"]) == (2, 0)
    assert_same_weights(artifact, config.folder / "sft/artifact")


def test_the_best_iteration_is_kept_and_not_the_last(run, beside, make_stage, metrics, monkeypatch):
    config = beside(run(ALL_BUT_PPO), "--ppo.iterations", "3")
    judged, kept = {}, []
    rewards = iter([0.0, 2.0, 1.0, 1.5])

    def reward(self, prompts, iteration):
        judged[iteration] = self._models.sampler.model.state_dict()["lm_head.weight"].clone()
        return next(rewards)

    monkeypatch.setattr(Evaluator, "reward", reward)
    artifact = make_stage(config, "ppo")
    assert metrics(artifact)["best_iteration"] == 1
    kept = weights(artifact)["lm_head.weight"]
    assert [torch.equal(kept, weight) for _, weight in sorted(judged.items())] == [False, True, False, False]


def test_the_reward_that_chooses_is_the_one_that_ppo_maximises(run):
    """Safety's score for a prompt of safety and for a response that its model calls unsafe, else helpfulness's."""
    config, sent = run(ALL_BUT_PPO), {}
    prompts, found = load_prompts(config).held_out, opened(config)
    context: Any = SimpleNamespace(
        device=torch.device("cpu"), tracker=SimpleNamespace(metrics=lambda metrics, step: sent.update(metrics))
    )
    answers: Any = Evaluator(config, context, found, reward_set(config, found)).answers(prompts)
    helpful, safety = (answers.scores[f"reward.{name}"] for name in ("helpfulness", "safety"))
    logits = [score + found.reward_models["safety"].module.offset for score in safety]
    of_helpful = sorted(logit for logit, prompt in zip(logits, prompts, strict=True) if prompt.tag == "helpful")
    middle = sum(of_helpful[len(of_helpful) // 2 - 1 :][:2]) / 2
    threshold = {"safety_threshold": 1 / (1 + math.exp(-middle))}
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update=threshold)})
    chosen_by = Evaluator(config, context, found, reward_set(config, found)).reward(prompts, 0)
    by_safety = [prompt.tag == "safety" or logit < middle for prompt, logit in zip(prompts, logits, strict=True)]
    kinds = {(prompt.tag, branch) for prompt, branch in zip(prompts, by_safety, strict=True)}
    assert kinds == {("safety", True), ("helpful", True), ("helpful", False)}
    scores = [s if branch else h for h, s, branch in zip(helpful, safety, by_safety, strict=True)]
    assert chosen_by == sent["eval/reward"] == pytest.approx(sum(scores) / len(scores))
    assert sent["eval/reward_helpfulness"] == pytest.approx(sum(helpful) / len(helpful))
    assert sent["eval/kl"] == pytest.approx(sum(answers.kl) / len(answers.kl), abs=1e-6)
