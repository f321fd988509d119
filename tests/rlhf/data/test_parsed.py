"""The run's data as records on disk: what is read is what was parsed, and the user's files are parsed once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward_data import Demonstration, Message, Preference, Prompt
from rlhf.config import DataConfig, RoleConfig, RunConfig, SourceConfig
from rlhf.data import Split, parsed
from rlhf.errors import UserError
from rlhf.runs import provenance

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
dialogues = st.lists(st.builds(Message, st.sampled_from(["user", "assistant", "system"]), texts), min_size=1).map(tuple)
tags = st.sampled_from(["helpful", "safety"])
rows = {
    "demonstrations": st.builds(Demonstration, dialogues, tags, texts),
    "preferences": st.builds(
        Preference,
        dialogues,
        texts,
        texts,
        st.sampled_from(["better", "unrated"]),
        tags,
        st.sampled_from(["safe", "unknown"]),
        st.sampled_from(["unsafe", "unknown"]),
        texts,
    ),
    "prompts": st.builds(Prompt, dialogues, tags, texts),
}
splits = st.fixed_dictionaries(
    {
        role: st.builds(Split, st.lists(row), st.lists(row), st.dictionaries(texts, texts), st.lists(texts))
        for role, row in rows.items()
    }
)


def run_on(folder: Path, **data) -> RunConfig:
    sources = {role: RoleConfig(train=[SourceConfig(path=f"{role}.jsonl")]) for role in rows}
    return RunConfig(name="run", runs_dir=folder, data=DataConfig(root=folder, **sources, **data))


@given(splits)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_read_is_what_was_parsed(tmp_path, splits):
    config = run_on(tmp_path)
    parsed.write(config, splits)
    assert parsed.read(config, list(rows)) == splits
    assert list(parsed.read(config, ["prompts"])) == ["prompts"]


@pytest.fixture
def on_disk(tmp_path) -> RunConfig:
    for role, form in (
        ("demonstrations", {"prompt": "d{}", "completion": "yes"}),
        ("preferences", {"prompt": "p{}", "chosen": "yes", "rejected": "no"}),
        ("prompts", {"prompt": "q{}"}),
    ):
        lines = [json.dumps(form | {"prompt": form["prompt"].format(n)}) for n in range(40)]
        (tmp_path / f"{role}.jsonl").write_text("\n".join(lines))
    return run_on(tmp_path)


def test_a_stage_reads_no_file_of_the_user_again(on_disk, tmp_path):
    whole = provenance.parse_data(on_disk)
    parsed.write(on_disk, whole)
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    data = provenance.stage_data(on_disk, ["preferences", "prompts"])
    assert data == {role: whole[role] for role in ("preferences", "prompts")}
    assert provenance.parents(data, {}).keys() == {"preferences: preferences.jsonl", "prompts: prompts.jsonl"}


def test_without_a_driver_the_first_rank_parses(on_disk):
    assert provenance.stage_data(on_disk, ["prompts"])["prompts"] == provenance.parse_data(on_disk)["prompts"]
    assert parsed.manifest(on_disk) is not None


def test_other_settings_of_the_data_are_parsed_anew(on_disk, tmp_path):
    before = provenance.stage_data(on_disk, ["prompts"])["prompts"]
    after = provenance.stage_data(run_on(tmp_path, held_out_fraction=0.4), ["prompts"])["prompts"]
    assert len(after.held_out) > len(before.held_out)


def test_data_that_cannot_be_used_leaves_nothing_behind(on_disk, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as caught:
        provenance.stage_data(on_disk, ["prompts"])
    assert caught.value.exit_code == 3 and parsed.manifest(on_disk) is None


def test_the_tokenizer_of_a_tiny_model_reads_the_same_rows_before_and_after(on_disk):
    before = parsed.training_demonstrations(on_disk)
    provenance.ensure_data(on_disk)
    assert parsed.training_demonstrations(on_disk) == before
