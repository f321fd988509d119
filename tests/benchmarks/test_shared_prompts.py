"""The benchmark of shared prompts on a random model of some ten thousand parameters."""

import json

from benchmarks import shared_prompts


def test_a_quick_run_prints_one_table_and_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "shared_prompts.json"
    lengths = ["--prompt-tokens", "5", "--answers", "1", "3", "--answer-tokens", "4", "--repeats", "2"]
    shared_prompts.main(["--quick", *lengths, "--out", str(out)])
    one, three = json.loads(out.read_text())["results"]
    assert one["tokens"] == {"apart": 2 * (5 + 4), "shared": 2 * (5 + 4)}
    assert three["tokens"] == {"apart": 6 * (5 + 4), "shared": 2 * (5 + 3 * 4)}
    for result in (one, three):
        for phase, sides in result["seconds"].items():
            assert [len(times) for times in sides.values()] == [2, 2]
            assert result["times"][phase] == result["median"][phase]["apart"] / result["median"][phase]["shared"]
    assert shared_prompts.table([one, three]) in capsys.readouterr().out
