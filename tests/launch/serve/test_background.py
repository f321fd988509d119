"""Responses are scored behind the requests; what a stop leaves over is scored after the next start."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy.exc import DBAPIError

from launch.serve import background as background_module
from launch.serve.background import BackgroundScoring
from launch.serve.rewards import reward_folders
from launch.serve.scoring import RewardModel
from rlhf.errors import UserError
from rlhf.serving.store import Exchange, Score, Store, Writer
from rlhf.serving.watch.records import unscored
from tests.launch.serve.servers import Running, running, until
from tests.launch.serve.test_scoring import OFFSET, make_reward_folder, plain_logit

SHIPPED = {kind: {"train": [{"path": "shipped"}]} for kind in ("demonstrations", "preferences", "prompts")}
PROMPT = [{"role": "user", "content": "what is 2 + 2?"}]  # the one that `plain_logit` writes out


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_folder(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/feedback.db")


@pytest.fixture
def server(folder: Path, reward: Path, store: Store) -> Iterator[Running]:
    writer = Writer(store)
    with running(folder, writer=writer, scoring=BackgroundScoring(writer, {"safety": RewardModel(reward)})) as found:
        yield found


def exchange(number: int, response: str = "it is 4", **more: Any) -> Exchange:
    return Exchange(
        id=f"chatcmpl-{number}:0",
        kind=more.pop("kind", "chat"),
        model="tiny",
        digest=None,
        messages=more.pop("messages", PROMPT),
        response=response,
        finish="stop",
        prompt_tokens=1,
        completion_tokens=1,
        seconds=1,
        sampling={},
        created=more.pop("created", time.time()),
    )


def test_a_response_is_scored_after_it_was_given(server: Running, reward: Path, store: Store) -> None:
    with server.http() as http:
        found = http.post("/v1/chat/completions", json={"messages": PROMPT, "n": 2, "max_tokens": 5}).json()
        until(lambda: len(store.scores()) == 2)
        text = http.get("/metrics").text
    texts = {f"{found['id']}:{n}": choice["message"]["content"] for n, choice in enumerate(found["choices"])}
    for score in store.scores():
        logit = plain_logit(reward, texts[score.exchange_id])
        assert (score.name, score.digest) == ("safety", None)
        assert score.raw == pytest.approx(logit, abs=1e-4)
        assert score.value == pytest.approx(logit - OFFSET, abs=1e-4)
    assert 'rlhf_serve_scored_total{reward="safety"} 2.0' in text


def test_what_a_stop_left_over_is_scored_once_after_the_next_start(reward: Path, store: Store) -> None:
    store.add([exchange(n, created=n) for n in range(20)])
    store.add([exchange(20, kind="completion"), exchange(21, messages=[]), exchange(22, "4 " * 10_000)])
    for _ in "12":
        writer = Writer(store)
        scoring = BackgroundScoring(writer, {"helpful": RewardModel(reward)})
        until(lambda: not unscored(store, "helpful", None, 1))
        scoring.close()
    assert sorted(row.exchange_id for row in store.scores()) == sorted(f"chatcmpl-{n}:0" for n in range(20))


def test_another_reward_model_reads_all_again(store: Store) -> None:
    store.add([exchange(1, created=1), exchange(2, created=2)])
    store.add_scores(
        [Score("chatcmpl-1:0", "helpful", 0.5, digest="a"), Score("chatcmpl-2:0", "helpful", None, digest="b")]
    )
    assert [row.id for row in unscored(store, "helpful", "a", 9)] == ["chatcmpl-2:0"]
    assert [row.id for row in unscored(store, "helpful", "b", 9)] == ["chatcmpl-1:0"]
    assert [row.id for row in unscored(store, "helpful", None, 9)] == ["chatcmpl-2:0", "chatcmpl-1:0"]  # newest first
    assert [row.id for row in unscored(store, "safety", "a", 1, without=["chatcmpl-2:0"])] == ["chatcmpl-1:0"]
    assert [row.id for row in unscored(store, "safety", "a", 9, since=2)] == ["chatcmpl-2:0"]


def test_a_failing_reward_model_fails_no_request(
    server: Running, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = server.service.scoring
    assert scoring
    model: Any = scoring.rewards["safety"]
    with server.http() as http, monkeypatch.context() as patch:
        patch.setattr(model._model, "score", lambda *_: 1 / 0)
        asked = {"messages": PROMPT, "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=asked).status_code == 200
        until(lambda: scoring.failed["safety"] == 1)
        patch.undo()
        assert http.post("/v1/chat/completions", json=asked).status_code == 200
        until(lambda: len(store.scores()) == 1)  # the one that failed has its turn after a restart


def test_a_database_that_is_away_stops_no_scoring(
    server: Running, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_module, "ANYWAY_S", 0.01)
    calls = []

    def away(*_: Any) -> None:
        calls.append(1)
        raise DBAPIError("select", {}, Exception("gone"))

    with monkeypatch.context() as patch:
        patch.setattr(background_module, "unscored", away)
        with server.http() as http:
            assert http.post("/v1/chat/completions", json={"messages": PROMPT, "max_tokens": 2}).status_code == 200
        until(lambda: len(calls) > 2)
    until(lambda: len(store.scores()) == 1)


# --- whose scores


def make_run(folder: Path, digest: str = "d") -> Path:
    """A run's PPO policy and its two reward models, without weights."""
    policy = folder / "ppo/artifact"
    for part, kind in (
        ("ppo", "ppo"),
        ("reward/helpfulness", "reward/helpfulness"),
        ("reward/safety", "reward/safety"),
    ):
        (folder / part / "artifact").mkdir(parents=True)
        parents = {"reward/helpfulness": "d", "reward/safety": "d"} if part == "ppo" else {}
        manifest = {"kind": kind, "digest": digest if part != "ppo" else "p", "parents": parents}
        (folder / part / "artifact/manifest.json").write_text(json.dumps(manifest))
    (folder / "ppo/config.yaml").write_text(yaml.safe_dump({"name": "old-name", "data": SHIPPED}))
    return policy


def test_the_reward_models_are_those_of_the_run(tmp_path: Path) -> None:
    policy = make_run(tmp_path / "run")
    assert reward_folders([], policy) == {
        name: tmp_path / "run/reward" / name / "artifact" for name in ("helpfulness", "safety")
    }
    assert reward_folders(["none"], policy) == {}
    assert reward_folders([], make_run(tmp_path / "other", digest="trained again")) == {}
    (tmp_path / "run/ppo/config.yaml").write_text("name: of-another-version")
    assert reward_folders([], policy) == {}
    (tmp_path / "run/ppo/config.yaml").unlink()
    assert reward_folders([], policy) == {}
    assert reward_folders([], tmp_path) == {}


def test_reward_models_that_are_named_must_be_there(reward: Path, tmp_path: Path) -> None:
    assert reward_folders([f"helpful={reward}"], tmp_path) == {"helpful": reward}
    with pytest.raises(UserError):
        reward_folders(["helpful"], tmp_path)
    with pytest.raises(UserError) as missing:
        reward_folders([f"helpful={tmp_path}/none"], tmp_path)
    assert missing.value.exit_code == 4
