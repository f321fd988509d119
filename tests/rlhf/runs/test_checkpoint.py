"""Checkpoints of PPO: whole or not there, newest first, and a resumed engine goes on as if nothing had happened."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhf.config import HardwareConfig, OptimConfig
from rlhf.distributed.engine import LocalEngine
from rlhf.errors import UserError
from rlhf.ppo.rollout_source import Prefetched
from rlhf.runs import checkpoint

STATE = {"iteration": 2, "beta": 0.0125, "best": -0.5, "best_iteration": 1, "since_best": 1}


@pytest.fixture
def engines():
    """Two engines that have made one step."""
    made = {name: LocalEngine(nn.Linear(3, 2), OptimConfig(lr=0.1), 10, HardwareConfig()) for name in ("a", "b")}
    for engine in made.values():
        learn(engine)
    return made


def learn(engine):
    engine.backward(engine(torch.ones(4, 3)).pow(2).sum(), 8, last=True)
    engine.step()


def weights(engines):
    return {name: engine.module.weight.detach().clone() for name, engine in engines.items()}


def test_a_checkpoint_brings_back_state_and_engines(engines, tmp_path):
    checkpoint.save(tmp_path, 2, engines, STATE)
    saved = weights(engines)
    for engine in engines.values():
        learn(engine)
    ahead = weights(engines)
    restored = checkpoint.restore(tmp_path, engines)
    assert restored is not None
    assert {key: restored[key] for key in STATE} == STATE
    assert all(torch.equal(saved[name], weight) for name, weight in weights(engines).items())
    for engine in engines.values():
        learn(engine)
    assert all(torch.equal(ahead[name], weight) for name, weight in weights(engines).items())


def test_the_coefficient_of_the_kl_keeps_every_digit(engines, tmp_path):
    kl_coef = 0.1 / 3 * 1.0007
    checkpoint.save(tmp_path, 2, engines, STATE | {"beta": kl_coef})
    restored = checkpoint.restore(tmp_path, engines)
    assert restored is not None and restored["beta"] == kl_coef


def test_nothing_to_restore_changes_nothing(engines, tmp_path):
    before = weights(engines)
    assert checkpoint.restore(tmp_path / "none", engines) is None
    assert all(torch.equal(before[name], weight) for name, weight in weights(engines).items())


def test_the_newest_whole_checkpoint_is_taken(engines, tmp_path):
    for iteration in (9, 10):  # as text "9" would come after "10"
        for engine in engines.values():
            learn(engine)
        checkpoint.save(tmp_path, iteration, engines, STATE | {"iteration": iteration})
    newest = weights(engines)
    for engine in engines.values():
        learn(engine)
    restored = checkpoint.restore(tmp_path, engines)
    assert restored is not None and restored["iteration"] == 10
    assert all(torch.equal(newest[name], weight) for name, weight in weights(engines).items())


def test_a_torn_checkpoint_is_passed_over_and_written_anew(engines, tmp_path):
    checkpoint.save(tmp_path, 1, engines, STATE | {"iteration": 1})
    torn = tmp_path / "iteration-000002"
    shutil.copytree(tmp_path / "iteration-000001", torn)
    (torn / "state.json").unlink()
    (torn / "leftover").write_text("")
    assert checkpoint.newest(tmp_path) == tmp_path / "iteration-000001"
    assert not torn.exists()
    restored = checkpoint.restore(tmp_path, engines)
    assert restored is not None and restored["iteration"] == 1
    checkpoint.save(tmp_path, 2, engines, STATE)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["iteration-000001", "iteration-000002"]


def test_it_is_torn_until_every_engine_is_written(engines, tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("the disk is full")

    monkeypatch.setattr(engines["b"], "save", fail)
    with pytest.raises(OSError, match="disk is full"):
        checkpoint.save(tmp_path, 1, engines, STATE)
    assert checkpoint.complete(tmp_path) == []


def test_a_checkpoint_that_is_being_removed_is_no_longer_whole(engines, tmp_path, monkeypatch):
    """A removal that is killed leaves a part of the files behind, in whatever order."""
    for iteration in (1, 2):
        checkpoint.save(tmp_path, iteration, engines, STATE)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    checkpoint.save(tmp_path, 3, engines, STATE)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["iteration-000002", "iteration-000003"]


def test_numbers_are_compared_and_not_names(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name).mkdir()
        checkpoint.commit(tmp_path / name, {})
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-10"


def test_a_kept_policy_stays_while_a_checkpoint_names_it(engines, tmp_path):
    for iteration in (3, 5, 7, 8):
        checkpoint.best_folder(tmp_path, iteration).mkdir()
    for iteration, best in ((4, 3), (6, 5)):
        checkpoint.save(tmp_path, iteration, engines, STATE | {"best_iteration": best})
    checkpoint.forget_bests(tmp_path, current=8)
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-000003", "best-000005", "best-000008"]


def test_only_the_last_two_are_kept(engines, tmp_path):
    for iteration in (1, 2, 3, 4):
        checkpoint.save(tmp_path, iteration, engines, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iteration-000003", "iteration-000004"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit_the_state(file: Path) -> None:
    state = file.parents[1] / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"beta": 9.0}))


def tear_the_state(file: Path) -> None:
    truncate(file.parents[1] / "state.json")
    truncate(file.parents[1] / "state.json")


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink, edit_the_state, tear_the_state])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(
    engines: dict[str, LocalEngine], tmp_path: Path, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path, 1, engines, STATE | {"iteration": 1})
    older = weights(engines)
    for engine in engines.values():
        learn(engine)
    checkpoint.save(tmp_path, 2, engines, STATE)
    harm(next(path for path in sorted((tmp_path / "iteration-000002/a").rglob("*")) if path.is_file()))

    restored = checkpoint.restore(tmp_path, engines)
    assert restored is not None and restored["iteration"] == 1
    assert all(torch.equal(older[name], weight) for name, weight in weights(engines).items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-iteration-000002", "iteration-000001"]
    assert "a checkpoint is damaged" in capsys.readouterr().err

    checkpoint.save(tmp_path, 2, engines, STATE)
    assert checkpoint.newest(tmp_path) == tmp_path / "iteration-000002"


def test_where_all_are_damaged_the_stage_does_not_begin_anew_unasked(
    engines: dict[str, LocalEngine], tmp_path: Path
) -> None:
    checkpoint.save(tmp_path, 1, engines, STATE)
    edit_the_state(tmp_path / "iteration-000001/a/any")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged") as caught:
        checkpoint.restore(tmp_path, engines)
    assert caught.value.exit_code == 4
    assert checkpoint.restore(tmp_path, engines) is None


class Payload:
    """Runs a command when it is unpickled in full."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def plain_pickle(file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(Payload(marker)))


def tensor_file(file: Path, marker: Path) -> None:
    torch.save({"weight": Payload(marker)}, file)


def seal_anew(checkpoint_folder: Path) -> None:
    """The digests as someone would write them who knows how."""
    state = json.loads((checkpoint_folder / "state.json").read_text())
    state.pop("digest")
    for name, entry in state["files"].items():
        content = (checkpoint_folder / name).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (checkpoint_folder / "state.json").write_text(
        json.dumps(state | {"digest": hashlib.sha256(text.encode()).hexdigest()})
    )


def test_the_payload_would_run(tmp_path: Path) -> None:
    tensor_file(tmp_path / "file.pt", tmp_path / "ran")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("plant", [plain_pickle, tensor_file])
def test_nothing_in_a_checkpoint_is_run(
    engines: dict[str, LocalEngine],
    iteration: SimpleNamespace,
    tmp_path: Path,
    plant: Callable[[Path, Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefetched = Prefetched()
    prefetched.keep(iteration.rollout, (1, 2))
    parts = {**engines, "prefetched": prefetched}
    checkpoint.save(tmp_path / "whole", 1, parts, STATE)
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert len(names) == 4
    for number, name in enumerate(names):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "whole", folder)
        plant(folder / name, tmp_path / "ran")
        if name.name != "state.json":
            seal_anew(folder / "iteration-000001")
        with pytest.raises(UserError) as caught:
            checkpoint.restore(folder, parts)
        assert caught.value.exit_code == 4
        assert name.name in caught.value.message + capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_files_of_another_user_are_not_read(
    engines: dict[str, LocalEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, engines, STATE)
    theirs, owner = tmp_path / "iteration-000001/b/rank-0.pt", os.geteuid() + 4711
    monkeypatch.setattr(checkpoint, "_owner", lambda path: owner if path == theirs else path.lstat().st_uid)
    with pytest.raises(UserError, match=rf"b/rank-0.pt belongs to another user \({owner}\)") as caught:
        checkpoint.restore(tmp_path, engines)
    assert caught.value.exit_code == 4

    monkeypatch.setattr(checkpoint, "_owner", lambda path: owner)  # what we write has this owner too
    assert checkpoint.restore(tmp_path, engines) is not None
