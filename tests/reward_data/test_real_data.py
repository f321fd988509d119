"""Every file of the folder of real data sets, where there is one, with the counts that were taken by hand.

The folder is named by RLHF_REAL_DATA, or lies at `shared/data` beside the checkout.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from reward_data import DataError, Source, check, load

FOLDER = Path(os.environ.get("RLHF_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no folder of real data")

NO_DATA = {"PROVENANCE.json", "split.json"}
COUNTS: dict[str, tuple] = {  # file: kind, records, refused rows by kind
    "helpsteer2_strength_gold100/helpsteer2_subset_annotated.json": ("preferences", 100, {}),
    "helpsteer2_strength_gold100/pairs.jsonl": ("preferences", 100, {}),
    "hh_harmless_test/pairs.jsonl": ("preferences", 2304, {"empty_reply": 4, "bad_row": 4}),
    "hh_harmless_test/test.jsonl": ("preferences", 2303, {"empty_reply": 4, "unequal_prompts": 5}),
    "llamafactory_demo/alpaca_en_demo.json": ("demonstrations", 999, {}),
    "llamafactory_demo/alpaca_zh_demo.json": ("demonstrations", 1000, {}),
    "oasst_manual/en_100_text.jsonl": ("prompts", 100, {}),
    "oasst_manual/en_100_tree.jsonl": ("preferences", 754, {}),
    "oasst_manual/pairs.jsonl": ("preferences", 754, {}),
    "oasst_manual/prompt_lottery_en_250_text.jsonl": ("prompts", 250, {}),
    "oasst_zh/oaast_rm_zh.json": ("preferences", 1809, {}),
    "oasst_zh/oaast_sft_zh.json": ("demonstrations", 689, {}),
    "oasst_zh/pairs.jsonl": ("preferences", 1809, {}),
    "open_instruct_pref_sample/preference_sample.jsonl": ("preferences", 100, {}),
    "pandalm_human3/pairs.jsonl": ("preferences", 945, {"empty_reply": 54}),
    "pandalm_human3/testset-v1.json": ("preferences", 854, {"empty_reply": 54, "bad_row": 6, "empty_prompt": 1}),
    "rasbt_polite_pref/instruction-data-with-preference.json": ("preferences", 1100, {}),
    "rasbt_polite_pref/instruction-data.json": ("demonstrations", 1100, {}),
    "rasbt_polite_pref/pairs.jsonl": ("preferences", 1100, {}),
    "self_instruct/seed_tasks.jsonl": ("demonstrations", 175, {}),
    "self_instruct/user_oriented_instructions.jsonl": ("demonstrations", 252, {}),
    "tulu1_human_graded/eval_instances_tulu_1.jsonl": ("prompts", 996, {}),
    "tulu1_human_graded/pairs.jsonl": ("preferences", 1150, {}),
    "zh_safety_prompts/Flames_1k_Chinese.jsonl": ("prompts", 1000, {}),
    "zh_safety_prompts/cvalues_responsibility_prompts.jsonl": ("prompts", 664, {}),
}
IDENTICAL = {
    "oasst_zh/oaast_rm_zh.json": 6,
    "oasst_zh/pairs.jsonl": 6,
    "rasbt_polite_pref/instruction-data-with-preference.json": 6,
    "rasbt_polite_pref/pairs.jsonl": 6,
    "tulu1_human_graded/pairs.jsonl": 40,
}


def test_every_file_has_its_count():
    files = {str(f.relative_to(FOLDER)) for f in FOLDER.glob("*/*.json*") if f.name not in NO_DATA}
    assert files == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_file(name):
    kind, records, refused = COUNTS[name]
    loaded = load(kind, FOLDER / name, bad_rows="skip")
    assert (len(loaded.rows), loaded.refused_kinds) == (records, refused)
    assert {f.kind: f.count for f in check(loaded.rows)} == (
        {"identical_pair": IDENTICAL[name]} if name in IDENTICAL else {}
    )


@pytest.mark.parametrize(
    ("name", "ratings"),
    [
        ("tulu1_human_graded/pairs.jsonl", {"negligibly": 376, "slightly": 426, "better": 348}),
        ("oasst_manual/en_100_tree.jsonl", {"slightly": 429, "better": 217, "significantly": 108}),
        ("oasst_manual/pairs.jsonl", {"slightly": 429, "better": 217, "significantly": 108}),
    ],
)
def test_genuine_ratings(name, ratings):
    assert Counter(row.rating for row in load("preferences", FOLDER / name).rows) == ratings


@pytest.mark.parametrize(("part", "rows"), [("sft", 460), ("rm_train", 1148), ("rm_val", 214), ("ppo_prompts", 481)])
def test_hh_split_selects_good_rows_alone(part, rows):
    select = (FOLDER / "hh_harmless_test/split.json", part)
    assert len(load("preferences", Source(FOLDER / "hh_harmless_test/test.jsonl", select=select)).rows) == rows


def test_hh_edge_cases_are_all_refused():
    select = (FOLDER / "hh_harmless_test/split.json", "edge_cases")
    with pytest.raises(DataError, match="9 bad rows"):
        load("preferences", Source(FOLDER / "hh_harmless_test/test.jsonl", select=select))


def test_replies_that_are_not_text_are_named_with_their_line():
    refused = load("preferences", FOLDER / "pandalm_human3/testset-v1.json", bad_rows="skip").refused
    named = [reason.rsplit("testset-v1.json:", 1)[1] for reason in refused if "true" in reason]
    assert named[0] == "1886: key 'response1' must be text, but is true"
    assert len(named) == 6
