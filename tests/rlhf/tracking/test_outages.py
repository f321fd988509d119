"""What MLflow could not take for a while is not left out: errors of real servers, a locked SQLite, and what is refused."""

import shutil
import sqlite3
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rlhf.config import TrackingConfig
from rlhf.tracking import fill_in, mlflow_client, mlflow_sync, open_tracker
from tests.rlhf.tracking.recorded import FILES_ONLY, finished


@contextmanager
def server(status: int, body: str):
    """An MLflow that answers everything so: its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = answer

        def log_message(self, *_) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()


def error_of(uri: str) -> MlflowException:
    with pytest.raises(MlflowException) as caught:
        MlflowClient(uri).set_tag("0" * 32, "key", "value")
    return caught.value


@pytest.fixture(autouse=True)
def no_retries(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(mlflow_sync, "RETRY_S", 0.0)


@pytest.mark.parametrize(
    ("status", "body", "outage"),
    [
        (401, "You are not authenticated.", True),
        (403, "Permission denied", True),
        (429, "slow down", True),
        (500, "Internal Server Error", True),
        (503, "down", True),
        (503, '{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "database is busy"}', True),
        (400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "tag value is too long"}', False),
    ],
)
def test_an_answer_that_may_be_another_one_later_is_an_outage(status, body, outage):
    with server(status, body) as uri:
        assert mlflow_client.is_outage(error_of(uri)) == outage


def test_a_server_that_is_gone_is_an_outage():
    assert mlflow_client.is_outage(error_of("http://127.0.0.1:9"))


def test_while_access_is_refused_nothing_is_lost_and_the_gap_is_filled_later(tmp_path, store, store_client, caplog):
    with server(401, "You are not authenticated.") as uri:
        refused = TrackingConfig(uri=uri, experiment="tests")
        finished(tmp_path, refused, metrics=({"loss": 1.0}, 1))
        assert not fill_in(tmp_path, refused) and "401" in caplog.messages[-1]
    assert fill_in(tmp_path, store)
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.close()
    assert store_client.get_run(tracker.run_id).data.metrics == {"loss": 1.0}


def test_a_locked_database_leaves_nothing_out(tmp_path, store, monkeypatch):
    """Reading goes on while another program writes; more tries fail than a refusal gets."""
    shutil.copy(store.uri.removeprefix("sqlite:///"), tmp_path / "own.db")
    settings = TrackingConfig(uri=f"sqlite:///{tmp_path / 'own.db'}", experiment="tests")
    run = tmp_path / "run"
    run_id = finished(run, settings, metrics=({"loss": 0.0}, 0))
    finished(run, FILES_ONLY, metrics=({"loss": 1.0}, 1))
    monkeypatch.setattr("mlflow.store.db.utils.sql.text", quick_timeout(monkeypatch))
    with closing(sqlite3.connect(tmp_path / "own.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        uploader = mlflow_sync.MLflowUploader(run, settings)
        for _ in range(3 * mlflow_sync.MAX_TRIES):
            failure = mlflow_sync._try_to_upload(uploader, tries=1)
            assert failure is not None and mlflow_client.is_outage(failure)
        other.execute("ROLLBACK")
    assert fill_in(run, settings)
    history = MlflowClient(settings.uri).get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 1.0)]


def quick_timeout(monkeypatch):
    """MLflow waits 20 s for a lock."""
    from mlflow.store.db.utils import sql

    original = sql.text
    return lambda statement: original(statement.replace("busy_timeout = 20000", "busy_timeout = 10"))
