"""Real stores of MLflow: a PostgreSQL cluster and a tracking server, each of this test alone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 120


def postgresql_programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`; Debian does not put it on the PATH. None: PostgreSQL is not installed."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


@contextmanager
def postgresql() -> Iterator[str]:
    """The URI of a new cluster that listens on a socket file only. PostgreSQL refuses to run as root."""
    programs = postgresql_programs()
    assert programs, "PostgreSQL is not installed"
    owner = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg"))

    def call(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, user=owner, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    try:
        if owner:
            shutil.chown(folder, owner)
        call("initdb", "-A", "trust", "-U", "mlflow")
        options = f"-c listen_addresses= -k {folder} -F"
        call("pg_ctl", "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql://mlflow@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def server(uri: str) -> Iterator[str]:
    """A real `mlflow server` on the store: its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    options = ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    command = ["mlflow", "server", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _responds(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
