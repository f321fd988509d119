"""Evaluating a reward model against a bare loop and by its memory: what is counted, and that unlike loops are refused."""

import json
from pathlib import Path

import pytest

from benchmarks import evaluate_memory, evaluate_reward
from rlhf.errors import UserError

QUICK = ["--quick", "--threads", "1", "--repeats", "1", "--pairs", "24", "--batch-size", "8"]


def test_both_sides_score_the_same_pairs(capsys):
    result = evaluate_reward.main(QUICK)
    assert result["pairs"] == 24 and result["scores_differ_by"] < 1e-4
    assert set(result["ratio"]) == {"seconds", "cpu_seconds"} and min(result["ratio"].values()) > 0
    assert evaluate_reward.shown(result) in capsys.readouterr().out
    assert json.loads(Path("evaluate_reward.json").read_text())["results"]["pairs"] == 24


def test_a_bare_loop_that_reads_something_else_is_refused(monkeypatch):
    real = evaluate_reward.score_window
    monkeypatch.setattr(
        evaluate_reward,
        "score_window",
        lambda model, tokenizer, texts, *rest: real(model, tokenizer, texts[::-1], *rest),
    )
    with pytest.raises(UserError, match="do not compute the same") as refused:
        evaluate_reward.main(QUICK)
    assert refused.value.exit_code == 6


def test_prompts_of_the_memory_benchmark_all_differ():
    rows = [json.loads(line) for line in evaluate_memory.distinct_pairs(9000)]
    assert len({row["prompt"][-1]["content"] for row in rows}) == 9000


@pytest.mark.proof
def test_memory_is_that_of_the_whole_command(capsys):
    small, large = evaluate_memory.main(["--quick", "--threads", "1", "--sizes", "20", "1200"])
    assert small["mib"] > 200 and large["mib"] < 1.05 * small["mib"]
    assert evaluate_memory.shown([small, large]) in capsys.readouterr().out
