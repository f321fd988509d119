"""vLLM as a sampler: it samples what the trainer's weights say, and tells with what probability."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from launch import preflight
from rlhf.data.batches import PromptBatch, select
from rlhf.generation import InProcessSampler, vllm
from rlhf.generation.vllm import Capacity, VLLMSampler
from rlhf.models.policy import PolicyModel
from rlhf.ppo import preflight_checks
from tests.worker_group import leave, run_ranks

EOS, PAD, R, SLOTS = 2, 0, 9, 16
TEMPERATURE = 0.7

# Another order of additions: in float32 logprobs of some nats move by 1e-6, in bf16, with its eight bits, by hundredths.
SAME = {"float32": 1e-4, "bf16": 0.1}


def installed(test):
    """For tests of an engine, which starts a process of its own and takes seconds for it."""
    missing = importlib.util.find_spec("vllm") is None
    return pytest.mark.integration(
        pytest.mark.skipif(missing, reason="vllm is not installed: make vllm installs it")(test)
    )


def make(seed: int, tied: bool = False, positions: int = 64) -> Any:
    """A Llama of 2 layers with the smallest heads that vLLM has kernels for, and random weights with opinions."""
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.12,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def passing(model: Any, poison: float = float("nan")):
    """Its weights one after the other in the same memory, as gathered shards come: each is gone with its turn."""
    memory = torch.empty(max(p.numel() for p in model.parameters()))
    for name, parameter in model.named_parameters():
        view = memory[: parameter.numel()].view(parameter.shape)
        view.copy_(parameter.detach())
        yield name, view
        memory.fill_(poison)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """engines(precision, length of a prompt) → a sampler, one for each, as engines take seconds to start; with a tied head
    in bf16.

    Nothing is compiled: that takes longer than all of these tests. All live to the end: one that goes takes the group of
    the others with it.
    """
    made: dict[tuple[str, int], VLLMSampler] = {}

    def engine(precision: str, prompt: int = 7) -> VLLMSampler:
        if (precision, prompt) not in made:
            folder = tmp_path_factory.mktemp(precision)
            make(5, tied=precision == "bf16", positions=prompt + 64).save_pretrained(folder)
            capacity = Capacity(SLOTS, prompt + R)
            made[precision, prompt] = VLLMSampler(folder, [EOS], PAD, precision, torch.device("cpu"), capacity)
        return made[precision, prompt]

    with torch._dynamo.config.patch(disable=True):
        yield engine
    if made:
        from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        made.clear()
        cleanup_dist_env_and_memory()


@pytest.fixture
def sampler(engines):
    """In float32, with the weights of make(0)."""
    sampler = engines("float32")
    sampler.load_weights(make(0).named_parameters())
    return sampler


@pytest.fixture
def sample(sampler, prompts, ppo_config):
    def sample(given=prompts, iteration=1, seed=0, sampler=sampler, **settings):
        settings = {"temperature": TEMPERATURE, "max_new_tokens": R} | settings
        return sampler.sample(given, ppo_config.sampling.model_copy(update=settings), seed, iteration)

    return sample


@pytest.fixture(scope="module")
def many(prompts):
    """Each prompt six times: more rows than the engine samples at once."""
    repeated = select(prompts, torch.arange(48) % 8)
    return dataclasses.replace(repeated, ids_B=torch.arange(48))


# --- weights and logprobs -------------------------------------------------------------------------------------------


@installed
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_logprobs_are_those_of_the_other_sampler_whatever_weights_come(
    engines, many, ppo_config, plain_logprobs, precision
):
    """The other sampler's model reads vLLM's answers, one row at a time. Twice, as a second load finds packed weights."""
    sampler = engines(precision)
    for seed in (0, 1):
        model = make(seed, tied=precision == "bf16")
        assert sampler.load_weights(passing(model)) == 4 * sum(p.numel() for p in model.parameters())
        rollout = sampler.sample(many, ppo_config.sampling, 0, 1)
        other = InProcessSampler(model, [EOS], PAD, precision)
        for row, expected in enumerate(plain_logprobs(other.model, rollout, TEMPERATURE)):
            got = rollout.behaviour_logprobs_BR[row][rollout.response_mask_BR[row]]
            torch.testing.assert_close(got, expected, atol=SAME[precision], rtol=0)
        assert rollout.behaviour_logprobs_BR.dtype == torch.float32


@installed
def test_a_run_does_not_start_without_the_trainers_weights(sample, sampler):
    """The check of a run sees a sampler that was given other weights, or none."""

    def check(model) -> preflight_checks.CheckResult:
        rollout = sample()
        logprobs_BR, _ = PolicyModel(model)(rollout.tokens_BT, rollout.mask_BT, R, TEMPERATURE)
        return preflight_checks.sampler_agrees(rollout, SimpleNamespace(logprobs_BR=logprobs_BR.detach()), "float32")  # type: ignore[arg-type]

    assert check(make(0)).figure < 1e-4
    with pytest.raises(Exception, match="sampler_logprobs"):
        preflight_checks.agree([check(make(1))])
    sampler.load_weights((name, torch.zeros_like(p)) for name, p in make(0).named_parameters())
    assert check(make(0)).figure > 0.1


# --- answers --------------------------------------------------------------------------------------------------------


@installed
def test_tokens_follow_the_softmax_in_vllm(sample, prompts):
    """Pearson's χ² of 2,000 first tokens against the model's own probabilities, with 11 degrees of freedom."""
    draws = 2000
    same = dataclasses.replace(select(prompts, [0] * draws), ids_B=torch.arange(draws))
    first_B = sample(same, max_new_tokens=1).tokens_BT[:, -1]
    with torch.no_grad():
        logits_V = make(0)(prompts.tokens_BP[:1][:, prompts.mask_BP[0]]).logits[0, -1]
    expected_V = torch.softmax(logits_V / TEMPERATURE, -1) * draws
    seen_V = torch.bincount(first_B, minlength=12)
    assert expected_V.max() < 0.9 * draws
    assert float(((seen_V - expected_V) ** 2 / expected_V).sum()) < 31.3  # one in a thousand


@installed
def test_an_answer_does_not_depend_on_the_batch(sample, answers, many):
    together = answers(sample(many))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    assert answers(sample(select(many, order))) == [together[i] for i in order]
    assert [answers(sample(select(many, [i])))[0] for i in (0, 17)] == [together[0], together[17]]


@installed
def test_prompts_of_more_tokens_than_a_step_reads_are_sampled(engines, sample, answers):
    """vLLM reads 4,096 tokens of prompts in a step, and would read a part of the fifth one."""
    sampler = engines("float32", prompt=1000)
    sampler.load_weights(make(0).named_parameters())
    tokens_BP = torch.randint(3, 12, (6, 1000), generator=torch.Generator().manual_seed(0))
    ids_B = torch.arange(6)
    prompts = PromptBatch(tokens_BP, torch.ones_like(tokens_BP, dtype=torch.bool), ids_B > 2, ids_B)
    together = answers(sample(prompts, sampler=sampler))
    assert len(together) == 6 and all(together)
    assert answers(sample(select(prompts, [4]), sampler=sampler)) == [together[4]]


@installed
@pytest.mark.parametrize("key", ["iteration", "seed"])
def test_another_iteration_and_another_seed_give_other_answers(sample, answers, many, key):
    changed = [a != b for a, b in zip(answers(sample(many)), answers(sample(many, **{key: 7})), strict=True)]
    assert sum(changed) > 36


@installed
def test_eos_ends_an_answer_and_nothing_follows(sample, many):
    rollout = sample(many)
    tokens_BR = rollout.tokens_BT[:, -R:]
    assert 0 < rollout.finished_B.sum() < 48  # both kinds are there
    for tokens, mask, logprobs, finished in zip(
        tokens_BR, rollout.response_mask_BR, rollout.behaviour_logprobs_BR, rollout.finished_B, strict=True
    ):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (R - length)
        assert (tokens[:length] == EOS).tolist() == [False] * (length - 1) + [bool(finished)]
        assert finished or length == R
        assert (tokens[length:] == PAD).all() and (logprobs[length:] == 0).all()
        assert (logprobs[:length] < 0).all()
    assert torch.equal(rollout.tokens_BT[:, :-R], many.tokens_BP)
    assert torch.equal(rollout.mask_BT, torch.cat([many.mask_BP, rollout.response_mask_BR], 1))


@installed
def test_positions_are_reported_and_every_row_asks_whether_to_go_on(sampler, many, ppo_config):
    asked: list[int] = []
    rollout = sampler.sample(many, ppo_config.sampling, 0, 1, lambda: asked.append(1))
    assert len(asked) == 48
    assert sampler.positions == (int(many.mask_BP.sum()), int(rollout.response_mask_BR.sum()) - 48)
    assert sampler.size == InProcessSampler(make(0), [EOS], PAD).size


@installed
def test_what_ends_the_sampling_leaves_nothing_behind(sample, sampler, many, ppo_config, answers):
    def refuse():
        raise ValueError("no room")

    expected = answers(sample(many))
    with pytest.raises(ValueError, match="no room"):
        sampler.sample(many, ppo_config.sampling, 0, 1, refuse)
    assert answers(sample(many)) == expected


@installed
def test_no_prompts_are_no_answers(sample, prompts):
    assert sample(select(prompts, slice(0, 0))).tokens_BT.shape == (0, 7 + R)


@installed
def test_the_head_sizes_that_a_run_is_refused_for_are_those_of_vllm():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    assert list(preflight.VLLM_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


# --- the process ----------------------------------------------------------------------------------------------------


@installed
def test_the_trainer_keeps_its_threads_environment_and_random_numbers(tmp_path, engines):
    engines("float32")  # what vLLM sets when it is imported is set
    make(0).save_pretrained(tmp_path)
    before = torch.set_num_threads, torch.get_num_threads(), dict(os.environ), os.sched_getaffinity(0)
    state = torch.get_rng_state()
    VLLMSampler(tmp_path, [EOS], PAD, "float32", torch.device("cpu"), Capacity(2, 7 + R))
    assert before == (torch.set_num_threads, torch.get_num_threads(), dict(os.environ), os.sched_getaffinity(0))
    assert torch.equal(state, torch.get_rng_state())


class Sleeper:
    """An engine that notes what it is told to do, reads weights when it has got all of them, and answers one request a
    step, with EOS."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.loaded: dict[str, torch.Tensor] = {}
        self.waiting: list[str] = []
        self.llm_engine = self

    def add_request(self, request_id: str, *_: Any) -> None:
        self.waiting.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return self.waiting != []

    def step(self) -> list[Any]:
        completion = SimpleNamespace(token_ids=[EOS], logprobs=[{EOS: SimpleNamespace(logprob=-1.0)}])
        return [SimpleNamespace(request_id=self.waiting.pop(0), outputs=[completion])]

    def abort_request(self, request_ids: list[str]) -> None:
        self.told += [f"abort {' '.join(request_ids)}"] if request_ids else []

    def wake_up(self, tags: list[str]) -> None:
        self.told.append(f"wake {' '.join(tags)}")

    def sleep(self, level: int) -> None:
        self.told.append(f"sleep {level}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.told.append(method)
        self.loaded = dict(kwargs["weights_iterator"])


@installed
def test_an_engine_that_goes_leaves_the_process_group_to_the_trainer(tmp_path):
    make(5).save_pretrained(tmp_path / "model")
    run_ranks(__file__, tmp_path, ranks=2, timeout=120)
    assert sorted(path.name for path in tmp_path.glob("added-*")) == ["added-0", "added-1"]


@pytest.fixture
def on_a_gpu(monkeypatch) -> Any:
    sampler: Any = VLLMSampler.__new__(VLLMSampler)
    sampler.llm, sampler.sleeps, sampler.asleep = Sleeper(), True, set()
    sampler.stop_ids, sampler.pad_id, sampler.dtype, sampler.tied = [EOS], PAD, torch.float32, {}
    sampler.tensor_parallel = 1
    monkeypatch.setattr(sampler, "_params", lambda *_: None)
    return sampler


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_handed_over_and_outlives_its_turn(on_a_gpu, tied):
    """A head that is the table, too: vLLM is told that it has one of its own."""
    model = make(0, tied)
    on_a_gpu.tied = vllm.tied_names(model)
    on_a_gpu.load_weights(passing(model))
    expected = dict(model.named_parameters(remove_duplicate=False))
    assert "lm_head.weight" in expected and on_a_gpu.llm.loaded.keys() == expected.keys()
    assert all(torch.equal(on_a_gpu.llm.loaded[name], weight) for name, weight in expected.items())


def test_on_a_gpu_the_engine_sleeps_but_while_it_loads_and_samples(on_a_gpu, prompts, ppo_config):
    for _ in range(2):
        on_a_gpu.load_weights([("w", torch.zeros(1))])
        on_a_gpu.sample(prompts, ppo_config.sampling, 0, 1)
    on_a_gpu.sample(prompts, ppo_config.sampling, 0, 2)  # an evaluation of the same weights
    once = ["reload_weights", "sleep 1"]
    again = ["wake weights", "reload_weights", "wake kv_cache", "sleep 1"]
    assert on_a_gpu.llm.told == [*once, *again, "wake kv_cache weights", "sleep 1"]


def test_what_ends_the_sampling_ends_the_other_rows_and_puts_the_engine_to_sleep(on_a_gpu, prompts, ppo_config):
    def refuse():
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        on_a_gpu.sample(prompts, ppo_config.sampling, 0, 1, refuse)
    assert on_a_gpu.llm.told == ["abort 1 2 3 4 5 6 7", "sleep 1"]


def main(folder: Path) -> None:
    """One of the ranks: opens an engine, lets it go, and adds numbers up with the other rank."""
    dist.init_process_group("gloo")
    with torch._dynamo.config.patch(disable=True):
        sampler = VLLMSampler(folder / "model", [EOS], PAD, "float32", torch.device("cpu"), Capacity(SLOTS, 7 + R))
        sampler.close()
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert ones.item() == 2
    (folder / f"added-{dist.get_rank()}").touch()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
