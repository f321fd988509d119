"""Which answers prompts get, when they end, and that nobody else in the batch changes them."""

import dataclasses
import math
import weakref
from typing import Any

import pytest
import torch

from rlhf.data.batches import select
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler, in_process, kv_cache
from rlhf.models.policy import PolicyModel

EOS, PAD, R = 2, 0, 9


# --- bf16 -----------------------------------------------------------------------------------------------------------


def test_a_sampler_in_bf16_stays_near_and_reports_float32(make_llama, prompts, ppo_config):
    rollout = InProcessSampler(make_llama(0), [EOS], PAD, "bf16").sample(prompts, ppo_config.sampling, 0, 1)
    read_BR, _ = PolicyModel(make_llama(0))(rollout.tokens_BT, rollout.mask_BT, R, 0.7)
    gap_BR = torch.where(rollout.response_mask_BR, read_BR - rollout.behaviour_logprobs_BR, 0.0).abs()
    assert rollout.behaviour_logprobs_BR.dtype == torch.float32
    assert 0 < gap_BR.max() < 0.1


def test_a_sampler_in_bf16_knows_where_a_token_stands(make_llama):
    """cos(position · θ^(-2i/d)) by hand; with rounded frequencies it is another angle after a few hundred tokens."""
    rotary: Any = InProcessSampler(make_llama(0), [EOS], PAD, "bf16").model.model.rotary_emb  # type: ignore[union-attr]
    position, halves = 500, 4
    cos_BTH, _ = rotary(torch.zeros(1, 1, 1, dtype=torch.float32), torch.tensor([[position]]))
    expected = [math.cos(position * 10_000 ** (-i / halves)) for i in range(halves)]
    assert cos_BTH[0, 0, :halves].tolist() == pytest.approx(expected, abs=1e-3)


# --- answers --------------------------------------------------------------------------------------------------------


def test_cold_sampling_is_the_greedy_generation_of_transformers(sample, make_llama, prompts):
    generated = make_llama(0).generate(
        prompts.tokens_BP,
        attention_mask=prompts.mask_BP.long(),
        do_sample=False,
        max_new_tokens=R,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    rollout = sample(temperature=1e-4)
    width = min(generated.shape[1], rollout.tokens_BT.shape[1])
    assert generated[:, :width].tolist() == rollout.tokens_BT[:, :width].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_number_of_rows_sampled_together_changes_no_answer(sample, expect_same_rollout, batch_size):
    expect_same_rollout(sample(batch_size=batch_size), sample())


def test_the_order_of_rows_changes_no_answer(sample, answers, prompts):
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = answers(sample(select(prompts, order)))
    assert shuffled == [answers(sample())[i] for i in order]


def test_padding_changes_no_answer(sample, answers, prompts):
    wider = dataclasses.replace(
        prompts,
        tokens_BP=torch.nn.functional.pad(prompts.tokens_BP, (5, 0), value=PAD),
        mask_BP=torch.nn.functional.pad(prompts.mask_BP, (5, 0)),
    )
    assert answers(sample(wider)) == answers(sample())


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensors_alive(monkeypatch):
    """Bytes of keys and values at the worst moment, counted by weak references to all that were ever made."""
    made, peak = [], [0]

    def noted(tensor):
        made.append(weakref.ref(tensor))
        alive = [x for ref in made if (x := ref()) is not None]
        peak[0] = max(peak[0], sum(x.numel() * x.element_size() for x in alive))
        return tensor

    def watched(self, x, columns):
        return noted(make(self, x, columns))

    make = kv_cache.SlotCache.room
    monkeypatch.setattr(kv_cache.SlotCache, "room", watched)
    return peak


@pytest.mark.parametrize("rows_that_fit", [1, 2, 5])
def test_rows_wait_where_memory_is_short_and_answers_stay_the_same(
    make_llama, prompts, ppo_config, expect_same_rollout, tensors_alive, monkeypatch, rows_that_fit
):
    monkeypatch.setattr(kv_cache, "SPARE_COLUMNS", 2)  # so that the cache is moved often
    settings = ppo_config.sampling.model_copy(update={"max_new_tokens": 20})
    plenty = InProcessSampler(make_llama(0), [EOS], PAD).sample(prompts, settings, 0, 1)
    model = make_llama(0)
    columns, layers = int(prompts.mask_BP.sum(1).max()) + 20, model.config.num_hidden_layers
    each = InProcessSampler(model, [EOS], PAD).size.cache_bytes * columns
    budget = rows_that_fit * each + rows_that_fit * each // (2 * layers)
    sampler = InProcessSampler(model, [EOS], PAD, cache_bytes=budget)
    tensors_alive[0] = 0
    expect_same_rollout(sampler.sample(prompts, settings, 0, 1), plenty)
    assert sampler.rows_at_once(columns - 20, settings) == rows_that_fit
    assert 0.5 * budget < tensors_alive[0] <= budget


def test_a_row_that_cannot_fit_even_alone_is_refused_in_numbers(make_llama, prompts, ppo_config):
    sampler = InProcessSampler(make_llama(0), [EOS], PAD, cache_bytes=1000)
    with pytest.raises(
        UserError, match=r"one row of 16 tokens .* lower ppo.max_prompt_length or ppo.sampling"
    ) as caught:
        sampler.sample(prompts, ppo_config.sampling, 0, 1)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("slots", [1, 3, 5])
@pytest.mark.parametrize("spare", [1, 128])
def test_a_waiting_prompt_takes_the_slot_of_a_row_that_ended(sample, expect_same_rollout, monkeypatch, slots, spare):
    """Whatever the number of slots, when newcomers are let in, and how often the cache makes room."""
    monkeypatch.setattr(kv_cache, "SPARE_COLUMNS", spare)
    together = sample(max_new_tokens=20)
    for share in (0.0, 1.0):
        monkeypatch.setattr(in_process, "ADMIT_FRACTION", share)
        expect_same_rollout(sample(max_new_tokens=20, batch_size=slots), together)


def test_prompts_read_in_several_passes_give_the_same(sample, expect_same_rollout, monkeypatch):
    together = sample()
    monkeypatch.setattr(in_process, "PREFILL_TOKENS", 8)
    expect_same_rollout(sample(), together)


@pytest.mark.parametrize(("slots", "prefill"), [(24, 2048), (24, 8), (7, 2048), (6, 1)])
def test_a_prompt_is_read_once_for_all_its_answers(make_llama, prompts, ppo_config, monkeypatch, slots, prefill):
    """Three answers to each of eight prompts; where slots are few, rows come in when all of them are free."""
    monkeypatch.setattr(in_process, "PREFILL_TOKENS", prefill)
    monkeypatch.setattr(in_process, "ADMIT_FRACTION", 0.75)
    given = dataclasses.replace(select(prompts, torch.arange(24) // 3), ids_B=torch.arange(24))
    sampler = InProcessSampler(make_llama(0), [99], PAD)
    rollout = sampler.sample(given, ppo_config.sampling.model_copy(update={"batch_size": slots}), 0, 1)
    assert sampler.positions == (int(prompts.mask_BP.sum()), 24 * (R - 1))
    assert rollout.response_mask_BR.all()


def test_a_long_prompt_among_short_ones_changes_no_answer(sample, answers, prompts):
    long = torch.arange(40) % 9 + 3
    tokens_BP = torch.nn.functional.pad(prompts.tokens_BP, (33, 0), value=PAD)
    mask_BP = torch.nn.functional.pad(prompts.mask_BP, (33, 0))
    tokens_BP[3], mask_BP[3] = long, True
    mixed = dataclasses.replace(prompts, tokens_BP=tokens_BP, mask_BP=mask_BP)
    got, apart = answers(sample(mixed)), answers(sample(select(mixed, [3])))
    expected = answers(sample())
    assert got[3] == apart[0]
    assert got[:3] + got[4:] == expected[:3] + expected[4:]


def test_one_prompt_gets_varied_answers(sample, answers, prompts):
    same = select(prompts, [0] * 32)
    by_id = answers(sample(dataclasses.replace(same, ids_B=torch.arange(32))))
    assert len({tuple(answer) for answer in by_id}) > 20


@pytest.mark.parametrize("key", ["iteration", "seed"])
def test_another_iteration_and_another_seed_give_other_answers(sample, answers, key):
    changed = [a != b for a, b in zip(answers(sample()), answers(sample(**{key: 7})), strict=True)]
    assert sum(changed) >= 6


# --- ends -----------------------------------------------------------------------------------------------------------


def test_eos_ends_an_answer_and_nothing_follows(sample):
    rollout = sample()
    tokens_BR = rollout.tokens_BT[:, -R:]
    assert 0 < rollout.finished_B.sum() < 8  # both kinds are there
    for tokens, mask, logprobs, finished in zip(
        tokens_BR, rollout.response_mask_BR, rollout.behaviour_logprobs_BR, rollout.finished_B, strict=True
    ):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (R - length)
        assert (tokens[:length] == EOS).tolist() == [False] * (length - 1) + [bool(finished)]
        assert finished or length == R
        assert (tokens[length:] == PAD).all() and (logprobs[length:] == 0).all()
        assert (logprobs[:length] < 0).all()


def test_every_stop_id_ends_an_answer_where_it_first_stands(make_llama, prompts, ppo_config, answers):
    """The oracle: answers that never end, cut behind the first of the stop ids."""
    free = InProcessSampler(make_llama(0), [99], PAD).sample(prompts, ppo_config.sampling, 0, 1)
    stops = [answers(free)[0][3], answers(free)[1][2], EOS]
    stopped = InProcessSampler(make_llama(0), stops, PAD).sample(prompts, ppo_config.sampling, 0, 1)
    for whole, cut, finished in zip(answers(free), answers(stopped), stopped.finished_B.tolist(), strict=True):
        places = [place for place, token in enumerate(whole) if token in stops]
        assert cut == (whole[: places[0] + 1] if places else whole)
        assert finished == bool(places)
    assert len({cut[-1] for cut in answers(stopped)} & set(stops)) > 1


def test_an_eos_in_the_very_last_place_counts_as_an_end(sample, answers):
    whole = sample(eos=99)
    last = int(whole.tokens_BT[0, -1])
    place = answers(whole)[0].index(last) + 1
    assert sample(eos=last, max_new_tokens=place).finished_B[0]


def test_rows_that_never_end_are_cut_and_said_to_be_unfinished(sample):
    rollout = sample(eos=99)
    assert rollout.response_mask_BR.all()
    assert rollout.response_mask_BR.shape[1] == R
    assert not rollout.finished_B.any()


def test_the_prompt_stays_what_it_was(sample, prompts):
    rollout = sample()
    assert torch.equal(rollout.tokens_BT[:, :-R], prompts.tokens_BP)
    assert torch.equal(rollout.mask_BT[:, :-R], prompts.mask_BP)
    assert torch.equal(rollout.mask_BT[:, -R:], rollout.response_mask_BR)


def test_sampling_beside_other_work_asks_before_every_forward_pass_and_samples_the_same(
    make_llama, prompts, ppo_config, sample
):
    sampler, told = InProcessSampler(make_llama(0), [EOS], PAD), []
    settings = ppo_config.sampling.model_copy(update={"batch_size": 3})
    passes, go_on = [], lambda: told.append(len(passes))
    sampler.model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rlhf.generation.in_process.is_plain_llama", lambda model: False
        )  # every pass is one of the model
        rollout = sampler.sample(prompts, settings, 0, 1, go_on)
    assert len(passes) > R and told == list(range(len(passes)))
    assert torch.equal(rollout.tokens_BT, sample(batch_size=3).tokens_BT)


def test_what_is_asked_can_end_the_sampling(make_llama, prompts, ppo_config):
    asked = []

    def refuse():
        asked.append(1)
        if len(asked) == 3:
            raise ValueError("no more")

    sampler = InProcessSampler(make_llama(0), [EOS], PAD)
    with pytest.raises(ValueError, match="^no more$"):
        sampler.sample(prompts, ppo_config.sampling, 0, 1, refuse)
    assert len(asked) == 3


def test_an_answer_may_be_one_token(sample, answers):
    one, whole = sample(max_new_tokens=1, batch_size=3), sample()
    assert answers(one) == [answer[:1] for answer in answers(whole)]
    assert one.finished_B.tolist() == [answer[0] == EOS for answer in answers(whole)]


def test_an_answer_may_end_with_its_first_token(sample, answers):
    """The token that row 0 draws first is made the end; its slot goes to the next prompt at once."""
    first = answers(sample())[0][0]
    for slots in (1, 3, 8):
        rollout = sample(eos=first, batch_size=slots)
        assert answers(rollout)[0] == [first] and rollout.finished_B[0]
        assert (rollout.response_mask_BR.sum(1) > 0).all()


def test_no_prompts_are_no_answers(sample, prompts):
    rollout = sample(select(prompts, slice(0, 0)))
    assert rollout.tokens_BT.shape == (0, 7 + R) and rollout.finished_B.shape == (0,)


# --- weights --------------------------------------------------------------------------------------------------------


def test_new_weights_make_the_sampler_that_model(make_llama, prompts, ppo_config):
    sampler, other = InProcessSampler(make_llama(0), [EOS], PAD), make_llama(1)
    moved = sampler.load_weights(other.named_parameters())
    got = sampler.sample(prompts, ppo_config.sampling, 0, 1)
    expected = InProcessSampler(other, [EOS], PAD).sample(prompts, ppo_config.sampling, 0, 1)
    assert torch.equal(got.tokens_BT, expected.tokens_BT)
    assert moved == 4 * sum(p.numel() for p in other.parameters())


def test_a_weight_that_the_sampler_does_not_have_is_an_error(make_llama):
    with pytest.raises(KeyError, match="surplus"):
        InProcessSampler(make_llama(0), [EOS], PAD).load_weights([("surplus", torch.zeros(1))])
