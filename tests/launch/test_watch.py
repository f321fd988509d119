"""`rlhf watch` on a store: tables, and alarms that ring once, to log, webhook and tracker."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli
from launch.watch import alarms as alarms_module
from launch.watch.alarms import post, tag
from rlhf.serving.store import Exchange, Score, Store
from rlhf.serving.watch.records import newest_alarms
from rlhf.serving.watch.rules import Rule

LOGIT = {"safe": 3.0, "unsafe": -3.0}


class Hook:
    """A server that keeps what is posted to it."""

    def __init__(self) -> None:
        self.status, self.got = 200, []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.got.append((self.headers["Content-Type"], json.loads(body)))
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=secret"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    monkeypatch.setattr(alarms_module, "PAUSE_S", 0.0)
    found = Hook()
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Store(f"sqlite:///{tmp_path}/run/feedback/feedback.db").close()
    return tmp_path / "run/feedback"


def say(folder: Path, *kinds: str, length: int = 10, ago_s: float = 1.0) -> None:
    store = Store(f"sqlite:///{folder}/feedback.db")
    already = len(store.exchanges())
    for number, kind in enumerate(kinds, already):
        messages = [{"role": "user", "content": f"question {number}"}]
        row = Exchange(
            f"r{number}", "chat", "m", None, messages, "a secret answer", "stop", 3, length, 2.0, {}, first_token_s=0.5
        )
        store.add([replace(row, created=time.time() - ago_s)])
        store.add_scores([Score(f"r{number}", "safety", LOGIT[kind] - 1, LOGIT[kind], "d")])
    store.close()


def write_rules(folder: Path, hook: Hook | None = None, *rules: dict[str, Any]) -> Path:
    content: dict[str, Any] = {"rules": list(rules) or [{"metric": "unsafe", "op": ">", "value": 0.2, "window": "1h"}]}
    (folder / "rules.yaml").write_text(yaml.safe_dump(content | ({"webhook": hook.url} if hook else {})))
    return folder / "rules.yaml"


def watch(folder: Path, *more: str) -> int:
    return cli.main(["watch", "--once", "--store", str(folder), "--tracking-uri", "null", *more])


@pytest.mark.parametrize(("width", "columns"), [("80", 3), ("160", 7)])
def test_a_look_shows_metrics_and_drift(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    say(folder, *["safe"] * 19, "unsafe", length=10)
    (folder.parent / "ppo/promotion").mkdir(parents=True)
    rows = [{"model": "candidate", "temperature": 1, "length": 40, "scores": {"safety": 2.0}}] * 50
    (folder.parent / "ppo/promotion/responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert watch(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("│") - 2 for line in lines if "refusals" in line] == [columns]
    shown = " ".join(" ".join(lines).split())
    for part in ("responses", "reward.safety", "unsafe", "refusals", "first_token_s", "tokens_per_s", "drift from the"):
        assert part in shown
    assert re.search(r"length +│ much", shown)
    assert re.search(r"reward.safety +│ none", shown)
    assert "secret" not in shown


def test_an_alarm_rings_once_and_ends_once(folder: Path, hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    rules = str(write_rules(folder, hook))
    say(folder, *["unsafe"] * 5, *["safe"] * 5)
    for _ in range(3):
        assert watch(folder, "--rules", rules) == 0  # another process remembers
    (kind, told) = hook.got[0]
    assert (len(hook.got), kind) == (1, "application/json")
    assert {key: told[key] for key in ("state", "metric", "op", "threshold", "window_s", "value", "n")} == {
        "state": "began",
        "metric": "unsafe",
        "op": ">",
        "threshold": 0.2,
        "window_s": 3600,
        "value": 0.5,
        "n": 10,
    }
    assert told["low"] == pytest.approx(0.2366, abs=1e-4)  # Wilson's, of 5 in 10
    say(folder, *["safe"] * 40)
    assert watch(folder, "--rules", rules) == watch(folder, "--rules", rules) == 0
    assert [told["state"] for _, told in hook.got] == ["began", "ended"]
    say(folder, *["unsafe"] * 60)
    watch(folder, "--rules", rules)
    assert [told["state"] for _, told in hook.got] == ["began", "ended", "began"]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition(":")[0] for line in lines] == ["alarm began", "alarm ended", "alarm began"]
    store = Store(f"sqlite:///{folder}/feedback.db")
    assert [alarm.ended is None for alarm in newest_alarms(store, 9)] == [True, False]
    store.close()


def test_a_rule_sees_its_window_alone(folder: Path) -> None:
    say(folder, *["unsafe"] * 50, ago_s=3700)
    say(folder, *["safe"] * 10)
    store = Store(f"sqlite:///{folder}/feedback.db")
    for window, count in (("1h", 0), ("2h", 1)):
        rule = {"metric": "unsafe", "op": ">", "value": 0.2, "window": window}
        assert watch(folder, "--since", "24h", "--rules", str(write_rules(folder, None, rule))) == 0
        assert len(newest_alarms(store, 9)) == count
    store.close()


def test_a_mean_of_few_conversations_rings_nothing(folder: Path) -> None:
    rules = str(write_rules(folder, None, {"metric": "length", "op": "<", "value": 20}))
    store = Store(f"sqlite:///{folder}/feedback.db")
    say(folder, *["safe"] * 4)
    assert watch(folder, "--rules", rules) == 0
    assert not newest_alarms(store, 9)
    say(folder, "safe")
    assert watch(folder, "--rules", rules) == 0
    assert len(newest_alarms(store, 9)) == 1
    store.close()


def test_alarms_are_metrics_and_tags(folder: Path) -> None:
    rules = str(write_rules(folder))
    say(folder, *["unsafe"] * 5)
    assert watch(folder, "--rules", rules) == 0
    (metrics,) = (json.loads(line) for line in (folder / "watch/metrics.jsonl").read_text().splitlines())
    assert metrics["watch/unsafe/1h"] == 1.0
    assert abs(metrics["step"] - time.time()) < 600
    events = [json.loads(line) for line in (folder / "watch/events.jsonl").read_text().splitlines()]
    (tags,) = [event["values"] for event in events if event["event"] == "tags" and "alarm" in str(event)]
    assert list(tags) == ["alarm.unsafe above 0.2 in 1h"]
    assert tags["alarm.unsafe above 0.2 in 1h"].startswith("began 20")


@pytest.mark.parametrize("status", [500, 403, 301])
def test_a_webhook_that_fails_stops_nothing(
    folder: Path, hook: Hook, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    hook.status = status
    say(folder, *["unsafe"] * 5)
    assert watch(folder, "--rules", str(write_rules(folder, hook))) == 0
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert str(status) in line
    assert "secret" not in line


def test_a_webhook_is_tried_again(hook: Hook) -> None:
    hook.status = 503
    assert not post(hook.url, {})
    assert len(hook.got) == 3
    hook.status = 200
    assert post(hook.url, {"a": 1})
    assert hook.got[3:] == [("application/json", {"a": 1})]
    assert not post("http://127.0.0.1:1/", {})


def test_drift_rings_only_beyond_chance(folder: Path) -> None:
    """Three equal lengths have a large index by chance; 33 do not."""
    rules = str(write_rules(folder, None, {"metric": "psi.length", "op": ">", "value": 0.25}))
    baseline = folder / "evaluation"
    baseline.mkdir()
    rows = [{"model": "m", "temperature": 1, "length": n, "scores": {}} for n in range(100)]
    (baseline / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(f"sqlite:///{folder}/feedback.db")
    for count in (3, 30):
        say(folder, *["safe"] * count, length=55)
        assert watch(folder, "--rules", rules, "--baseline", str(baseline)) == 0
        assert len(newest_alarms(store, 9)) == (count == 30)
    store.close()


@pytest.mark.parametrize(
    ("rule", "more", "code"),
    [
        ({"metric": "psi.length", "op": ">", "value": 1}, [], 2),
        ({"metric": "nothing", "op": ">", "value": 1}, [], 2),
        ({"metric": "unsafe", "op": ">", "value": 1}, ["--baseline", "none"], 4),
        ({"metric": "unsafe", "op": ">", "value": 1}, ["--store", "none"], 4),
    ],
)
def test_what_cannot_be_watched_is_told(folder: Path, rule: dict[str, Any], more: list[str], code: int) -> None:
    assert watch(folder, "--rules", str(write_rules(folder, None, rule)), *more) == code


def test_a_time_that_is_none_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        watch(folder, "--since", "yesterday")
    assert "write 30m, 1h or 7d" in capsys.readouterr().err


def test_tags_have_no_signs_that_mlflow_forbids() -> None:
    assert tag(Rule(metric="length", op="<", value=3)) == "alarm.length below 3 in 1h"
