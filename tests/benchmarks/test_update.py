"""The update phase against a bare loop, on a random model."""

import json

from benchmarks import packing, update


def test_both_sides_are_timed_over_all_tokens(tmp_path, capsys):
    out = tmp_path / "update.json"
    result = update.main(["--quick", "--threads", "1", "--repeats", "2", "--rows", "4", "--out", str(out)])
    assert result["tokens"] == int(packing.experience(768, 4).mask_BT.sum())
    assert {name: len(rates) for name, rates in result["tokens_per_second"].items()} == {"bare": 2, "ours": 2}
    assert json.loads(out.read_text())["results"] == result
    assert update.shown(result) in capsys.readouterr().out
