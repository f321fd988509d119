"""SFT and reward training against a bare loop, on a random model: what is counted, and that unlike loops are refused."""

import json
import math
from dataclasses import replace

import pytest

from benchmarks import bare, reward, sft
from rlhf.errors import UserError

QUICK = ["--quick", "--threads", "1", "--repeats", "2", "--steps", "3", "--rows", "64", "--batch", "4"]
QUICK += ["--micro-batch", "2", "--max-length", "128"]


def test_sft_prints_one_table_and_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "sft.json"
    result = sft.main([*QUICK, "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["results"] == result and record["device"] == "CPU, 1 threads"
    assert bare.shown(result) in capsys.readouterr().out
    assert result["losses"][0] == pytest.approx(math.log(768), abs=0.2)  # of random weights
    assert result["padding"] == 0 and 4 * 64 < result["tokens_per_step"] <= 4 * 128  # packed rows are nearly full
    assert [len(rates) for rates in result["tokens_per_second"].values()] == [2, 2]


def test_reward_training_starts_at_the_loss_of_a_head_of_zeros():
    result = reward.main(QUICK)
    assert math.log(2) <= result["losses"][0] <= math.log(1 + math.e)  # margins are 0 to 1
    assert result["losses"][1] != result["losses"][0]
    assert 0 < result["padding"] < 1


def test_a_bare_loop_that_does_less_is_refused(monkeypatch):
    def without_margin(model, passes):
        return reward.loss_of(model, [batch | {"margin": 0 * batch["margin"]} for batch in passes])

    monkeypatch.setattr(reward, "STAGE", replace(reward.STAGE, loss_of=without_margin))
    with pytest.raises(UserError, match="do not compute the same") as refused:
        reward.main(QUICK)
    assert refused.value.exit_code == 6


def test_the_first_step_is_not_timed():
    assert bare.turn([10.0, 11.0, 13.0], [3.0, 2.0, 1.0]) == bare.Turn([1.0, 2.0], [3.0, 2.0, 1.0])
