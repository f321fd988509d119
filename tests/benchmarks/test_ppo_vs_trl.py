"""What needs no TRL: the environment's refusal, dictated answers, and what is made of the timings."""

from types import SimpleNamespace

import pytest

from benchmarks.our_side import load_dice
from benchmarks.ppo_vs_trl import profile_of, summary, table
from benchmarks.sampling import tiny
from benchmarks.trl_environment import trl_python
from rlhf.config import SamplingConfig
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler, in_process

PARTS = [
    {"seconds": [90.0, 4.0, 2.0], "lengths": [1.0, 10.0, 20.0], "peak_memory": 3e9},
    {"seconds": [80.0, 8.0, 6.0], "lengths": [1.0, 30.0, 40.0], "peak_memory": 2e9},
]


def test_a_folder_with_other_things_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="no virtual environment"):
        trl_python(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_dictated_answers_are_what_the_sampler_gives(monkeypatch):
    for name in ("keyed_uniform", "pick_token"):  # put back afterwards
        monkeypatch.setattr(in_process, name, getattr(in_process, name))
    model, prompts, eos_id, pad_id = tiny()
    answers = [[*range(20, 20 + number), eos_id] for number in range(len(prompts.ids_B))]
    load_dice(SimpleNamespace(answers=answers, pad=pad_id))  # type: ignore[arg-type]
    settings = SamplingConfig(max_new_tokens=9, batch_size=3)
    rollout = InProcessSampler(model, [eos_id], pad_id).sample(prompts, settings, seed=0, iteration=1)
    read = zip(rollout.tokens_BT[:, -9:], rollout.response_mask_BR, strict=True)
    assert [tokens[mask].tolist() for tokens, mask in read] == answers


def test_the_first_iteration_of_a_round_warms_up():
    made = summary(PARTS, batch_size=16)
    assert made["seconds"] == [4.0, 2.0, 8.0, 6.0]
    assert (made["median_seconds"], made["samples_per_second"]) == (5.0, 3.2)
    assert (made["mean_length"], made["peak_memory"]) == (25.0, 3e9)


def test_ratios_are_ours_over_trls():
    other = summary([PARTS[0]], batch_size=16)  # a median of 3 seconds
    text = table({"ours": other, "trl": summary(PARTS, batch_size=16)})
    assert "| seconds an iteration, median | 5.00 | 3.00 | 0.60 |" in text


def test_our_ledger_leaves_the_first_iteration_out():
    def metrics(seconds):
        return {"perf/seconds_sampling": seconds / 4, "perf/seconds_iteration": seconds}

    made = profile_of([{"figures": [metrics(90.0), metrics(4.0)]}, {"figures": [metrics(80.0), metrics(6.0)]}])
    assert (made["iterations"], made["seconds"]) == (2, 5.0)
    assert made["phases"]["sampling"] == {"seconds": 1.25, "fraction": 0.25}
