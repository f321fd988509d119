"""How time grows: the fit on known shapes, and a real run of the sizes on a random model."""

import pytest

from benchmarks import scaling

QUICK = ["--quick", "--threads", "1", "--workers", "1", "--repeats", "1", "--length", "3"]


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 1.7])
def test_the_exponent_of_a_power_law_is_its_own(power):
    sizes = [1, 2, 4]
    assert scaling.exponent(sizes, [3.5 * size**power for size in sizes]) == pytest.approx(power)


def test_a_constant_part_lowers_the_exponent():
    assert 0 < scaling.exponent([1, 2, 4], [1 + size for size in (1, 2, 4)]) < 1


def test_a_table_of_planted_turns():
    def turn(seconds):
        return {**dict.fromkeys(scaling.SHOWN, seconds), "bytes": 2e9}

    sizes = [
        {"rows": rows, "length": length, "turns": [turn(s) for s in (99.0, 0.5 * rows * length**2, 0.0)]}
        for rows, length in scaling.SIZES
    ]
    text = scaling.shown(scaling.summary(2, sizes))
    assert "| 2 | update | 0.50 s | 1.00 s | 2.00 s | 1.00 | 2.00 s | 8.00 s | 2.00 |" in text
    assert "| 2 | memory | 2.00 GB | 2.00 GB | 2.00 GB | 0.00 | 2.00 GB | 2.00 GB | 0.00 |" in text


def test_answers_of_a_quick_run_are_as_long_as_asked(monkeypatch, capsys):
    seen = {}

    def keep(workers, sizes):
        seen[workers] = sizes
        return summary(workers, sizes)

    summary = scaling.summary
    monkeypatch.setattr(scaling, "summary", keep)
    lines = scaling.main(QUICK)
    assert [(s["rows"], s["length"]) for s in seen[1]] == [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4)]
    for size in seen[1]:
        (turn,) = size["turns"]
        assert turn["answer_tokens"] == 3 * size["length"]
        assert turn["iteration"] > turn["sampling"] + turn["scoring"] + turn["update"] > 0
        assert turn["bytes"] > 1e8  # a process with torch
    assert scaling.shown(lines) in capsys.readouterr().out
