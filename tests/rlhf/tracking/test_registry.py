"""Artifacts become versions of a registered model, with their parents, data and metrics, in every kind of store."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.config import TrackingConfig
from rlhf.errors import UserError
from rlhf.tracking import Registry, fill_in, mlflow_client, mlflow_sync, open_tracker
from tests.rlhf.tracking.recorded import finished
from tests.rlhf.tracking.stores import postgresql, postgresql_programs, server

needs_postgresql = pytest.mark.skipif(
    not (postgresql_programs() and importlib.util.find_spec("psycopg")),
    reason="PostgreSQL or psycopg (extra postgresql) is not installed",
)
slow = [pytest.mark.integration, pytest.mark.timeout(300)]
STORES = [
    "sqlite",
    pytest.param("postgresql", marks=[*slow, needs_postgresql]),
    pytest.param("server", marks=slow),
]


@pytest.fixture(params=STORES, scope="module")
def registry(request, tmp_path_factory) -> Iterator[TrackingConfig]:
    """Settings of an empty store."""
    folder = tmp_path_factory.mktemp("registry")
    sqlite = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_sync, "CLOSE_LIMIT_S", 120)  # a server on a loaded machine
        patch.chdir(folder)  # where MLflow puts the files of a run if the store does not say
        if request.param == "sqlite":
            yield TrackingConfig(uri=sqlite, experiment="tests")
        else:
            with postgresql() if request.param == "postgresql" else server(sqlite) as uri:
                yield TrackingConfig(uri=uri, experiment="tests")


@pytest.fixture
def client(registry):
    from mlflow import MlflowClient

    return MlflowClient(registry.uri)


def artifact(name: str, digest: str, inputs: dict[str, str] | None = None) -> dict:
    return {
        "name": name,
        "kind": "policy",
        "path": f"/runs/first/{name}/artifact",
        "digest": digest,
        "metrics": {"held_out/reward": 0.123456789},
        "step": 3,
        "dataset": {"name": "prompts, held out", "digest": "0" * 64},
        "registered": {
            "name": name,
            "description": "of run first",
            "tags": {"data.prompts: päth, x:train": "1234"},
            "inputs": inputs or {},
        },
    }


def test_a_version_knows_its_parents_data_and_metrics(tmp_path: Path, registry, client) -> None:
    finished(tmp_path / "sft", registry, model=(artifact("known-sft", "d-sft"),))
    policy = artifact("known-policy", "d-policy", {"sft": "d-sft", "reward/safety": "d-reward"})
    run_id = finished(tmp_path / "ppo", registry, model=(policy,))
    version = client.get_model_version_by_alias("known-policy", "candidate")
    assert (int(version.version), version.run_id, version.description) == (1, run_id, "of run first")
    model_id = version.tags.pop("logged_model")
    assert version.tags == {
        "artifact.path": "/runs/first/known-policy/artifact",
        "artifact.digest": "d-policy",
        "data.prompts: p_th_ x:train": "1234",
        "held_out/reward": "0.123457",
        "input.sft": "models:/known-sft/1 d-sft",
        "input.reward/safety": "d-reward",
    }
    is_server = (registry.uri or "").startswith("http")
    assert version.source == (f"models:/{model_id}" if is_server else "/runs/first/known-policy/artifact")
    linked = client.get_logged_model(model_id).tags["mlflow.modelVersions"]
    assert linked.replace(" ", "") == '[{"name":"known-policy","version":1}]'


def test_the_newest_version_is_the_candidate(tmp_path: Path, registry, client) -> None:
    first = artifact("newest", "d1")
    for number, digest in enumerate(("d1", "d2"), 1):
        finished(tmp_path / digest, registry, model=(artifact("newest", digest),))
        assert int(client.get_model_version_by_alias("newest", "candidate").version) == number
    finished(tmp_path / "d1", registry, model=(first,))  # a run that was repeated
    versions = client.search_model_versions("name = 'newest'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert int(client.get_model_version_by_alias("newest", "candidate").version) == 2


def test_an_upload_that_ended_before_the_version_goes_on(tmp_path: Path, registry, client, monkeypatch) -> None:
    """The model is an output of the run already, and MLflow refuses one twice."""
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_client, "send_version", lambda *_: None)
        finished(tmp_path, registry, model=(artifact("late", "d-late"),))
    assert client.search_model_versions("name = 'late'") == []
    finished(tmp_path, registry, model=(artifact("late", "d-late"),))
    assert int(client.get_model_version_by_alias("late", "candidate").version) == 1


def test_what_mlflow_missed_is_registered_in_the_order_in_which_it_was_made(tmp_path: Path, registry, client) -> None:
    """`ppo` stands before `sft` in the folder."""
    without = registry.model_copy(update={"uri": None})
    parent = open_tracker(tmp_path, without, "run", None, is_writer=True)
    for stage, inputs in (("sft", {}), ("ppo", {"sft": "late sft"})):
        tracker = open_tracker(tmp_path / stage, without, stage, "", is_writer=True)
        tracker.model(artifact(f"late-{stage}", f"late {stage}", inputs))
        tracker.close()
        time.sleep(0.01)  # events have their times in milliseconds
    parent.close()
    assert fill_in(tmp_path, registry)
    tags = client.get_model_version("late-ppo", "1").tags
    assert tags["input.sft"] == "models:/late-sft/1 late sft"


def test_a_champion_gives_way_and_comes_back(tmp_path: Path, registry, client) -> None:
    for digest in ("c1", "c2", "c3"):
        finished(tmp_path / digest, registry, model=(artifact("contest", digest),))
    versions = Registry(registry.uri)

    def champion() -> int | None:
        found = versions.champion("contest")
        return found and found.number

    assert champion() is None
    for number in (1, 3, 2):
        versions.promote(versions.version(f"models:/contest/{number}"))
        assert champion() == number
    assert versions.version("models:/contest@champion").digest == "c2"
    assert versions.version_of("c3", tmp_path).uri == "models:/contest/3"
    versions.promote(versions.version("models:/contest/2"))  # again, as after a kill: it is not its own predecessor
    for before in (3, 1, None):
        versions.undo("contest")
        assert champion() == before
    with pytest.raises(UserError, match="no champion"):
        versions.undo("contest")


@pytest.mark.parametrize(
    "reference", ["models:/contest/99", "models:/none/1", "models:/none@x", "models:/contest@none"]
)
def test_a_version_that_is_not_there_is_an_error_for_people(registry, client, tmp_path: Path, reference: str) -> None:
    finished(tmp_path, registry, model=(artifact("contest", "c1"),))
    with pytest.raises(UserError) as error:
        Registry(registry.uri).version(reference)
    assert error.value.exit_code == 4 and reference in error.value.message


def test_of_equal_artifacts_that_of_the_folder_is_meant(tmp_path: Path, registry, client) -> None:
    for run in ("first", "second"):
        equal = artifact("equal", "same digest") | {"path": f"/runs/{run}/ppo/artifact"}
        finished(tmp_path / run, registry, model=(equal,))
    found = [
        Registry(registry.uri).version_of("same digest", Path(f"/runs/{run}/ppo/artifact"))
        for run in ("first", "second")
    ]
    assert [version.number for version in found] == [1, 2]


def test_all_earlier_champions_are_remembered(tmp_path: Path, registry, client) -> None:
    for digest in ("e1", "e2"):
        finished(tmp_path / digest, registry, model=(artifact("to-and-fro", digest),))
    versions = Registry(registry.uri)
    for number in (1, 2, 1, 2):
        versions.promote(versions.version(f"models:/to-and-fro/{number}"))
    assert client.get_registered_model("to-and-fro").tags["champion.earlier"] == "[1, 2, 1]"
    client.set_registered_model_tag("to-and-fro", "champion.earlier", "[1, 2]")  # killed before the alias was set
    restored = versions.undo("to-and-fro")
    assert restored and restored.number == 1


def test_an_undone_promotion_leaves_no_trace(tmp_path: Path, registry) -> None:
    finished(tmp_path / "e1", registry, model=(artifact("undone", "e1"),))
    finished(tmp_path / "e2", registry, model=(artifact("undone", "e2"),))
    versions = Registry(registry.uri)
    first, second = (versions.version(f"models:/undone/{number}") for number in (1, 2))
    versions.promote(first)
    for _ in range(2):
        versions.promote(second)
        restored = versions.undo("undone")
        assert restored and restored.number == 1
    assert versions.undo("undone") is None
