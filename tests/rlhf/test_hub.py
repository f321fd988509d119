"""What the hub is asked, and what is said where it does not give a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf import hub as module
from rlhf.errors import UserError
from tests.hub import Hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 1000)
    (folder / "pytorch_model.bin").write_bytes(b"\0" * 1000)
    return folder


def refused(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        module.folder(name)
    return caught.value


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["owner/name", "gpt2", "owner/name@v1.0", "owner/name@refs/pr/1", "a-b/c.d_e-1"])
def test_a_name_is_one_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert module.is_of_hub(name)


@pytest.mark.parametrize("name", ["tiny", "./owner/name", "/a/b", "~/a", "a/b/c", "a folder", "owner/name@"])
def test_a_path_is_none(name: str) -> None:
    assert not module.is_of_hub(name)


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert not module.is_of_hub("owner/name")


def test_a_tokenizer_is_had_without_the_weights(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    assert files(module.folder("owner/name", weights=False)) == {"config.json"}
    assert files(module.folder("owner/name")) == {"config.json", "model.safetensors"}


def test_a_pinned_model_that_is_there_is_not_asked_for(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    pinned = module.pinned("owner/name")
    assert pinned == f"owner/name@{hub.commit('owner/name')}"
    there = module.folder(pinned)
    hub.requests.clear()
    assert module.folder(pinned) == there and hub.requests == []


def test_a_model_whose_commit_is_known_is_not_asked_for_again(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    there = module.folder("owner/name")
    hub.requests.clear()
    assert module.folder("owner/name") == there and hub.requests == []


def test_a_branch_is_no_commit(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    assert module.pinned("owner/name@main") == f"owner/name@{hub.commit('owner/name')}"


def test_a_commit_is_not_asked_for(hub: Hub) -> None:
    commit = f"owner/name@{'0123456789' * 4}"
    assert module.pinned(commit) == commit and hub.requests == []


def test_a_commit_stays_when_the_hub_has_a_newer_one(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    first = module.pinned("owner/name")
    (model / "config.json").write_text('{"new": true}')
    hub.add("owner/name", model)
    module._commit_now.cache_clear()
    assert module.pinned("owner/name").endswith(hub.commit("owner/name", 2)) and first.endswith(
        hub.commit("owner/name", 1)
    )
    assert module.folder(first, weights=False) != module.folder("owner/name", weights=False)


def test_sizes_are_known_before_a_download(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    assert module.sizes("owner/name") == module.Sizes(weights=1000, missing=1000)  # config.json came with the commit
    module.folder("owner/name")
    assert module.sizes("owner/name") == module.Sizes(weights=1000, missing=0)


def test_a_hub_that_is_away_is_no_mistake_of_the_user(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    hub.refuses = (503, "")
    error = refused("owner/name")
    assert error.exit_code == 8 and "the hub cannot be reached" in error.message and hub.url in error.message
    hub.refuses = None
    there = module.folder("owner/name")
    hub.refuses = (503, "")
    module._commit_now.cache_clear()
    assert module.folder("owner/name") == there


def test_a_hub_without_an_answer_is_one_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refused("owner/name")
    assert error.exit_code == 8 and "127.0.0.1:9" in error.message


def test_a_download_that_breaks_off_is_one_too(hub: Hub, model: Path) -> None:
    hub.add("owner/name", model)
    pinned = module.pinned("owner/name")
    hub.refuses = (500, "")
    assert refused(pinned).exit_code == 8
    hub.refuses, hub.lacks = None, "model.safetensors"
    assert refused(pinned).exit_code == 8
    hub.lacks, hub.breaks_off = "", "model.safetensors"
    assert refused(pinned).exit_code == 8


@pytest.mark.parametrize(
    ("name", "answer", "text"),
    [
        ("owner/absent", None, "there is no model 'owner/absent'"),
        ("owner/name@absent", None, "there is no model 'owner/name@absent'"),
        ("owner/name", (403, "GatedRepo"), "behind a licence that your token has not accepted"),
        ("owner/name", (401, ""), "there is no model 'owner/name'"),
    ],
)
def test_what_the_hub_does_not_give_is_a_missing_model(
    hub: Hub,
    model: Path,
    name: str,
    answer: tuple[int, str] | None,
    text: str,
) -> None:
    hub.add("owner/name", model)
    hub.refuses = answer
    error = refused(name)
    assert error.exit_code == 4 and text in error.message


def test_offline_a_model_must_be_in_the_cache(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("owner/name", model)
    hub.add("owner/other", model)
    there = module.folder("owner/name")
    module._commit_now.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert module.folder("owner/name") == there
    error = refused("owner/other")
    assert error.exit_code == 4 and "HF_HUB_OFFLINE" in error.message
