"""What a node says of itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PACKAGES = (
    *("accelerate", "datasets", "deepspeed", "numpy", "peft", "pydantic", "ray", "safetensors", "tokenizers", "torch"),
    *("transformers", "trl"),
)
CODE = ("rlhf", "stages", "launch", "reward_data")
SAMPLE = 16_000_000  # bytes that are written to measure a disk


@dataclass(frozen=True)
class NodeFacts:
    versions: dict[str, str]
    """Python's and those of packages; "missing" where there is none."""
    code: dict[str, str]
    """File of this project → digest."""
    model: dict[str, int]
    """File in the model's folder → bytes; empty where the model is none."""
    shm_bytes: int | None
    """Free in /dev/shm; None where there is none."""
    open_files: int
    disk_bytes: int
    """Free in the folder of the runs."""
    disk_rate: float
    """Bytes per second there, with fsync."""
    extension: bool
    """Whether DeepSpeed's CPU communication is compiled."""
    gpus: tuple[str, ...]
    """Model and driver of each."""
    interfaces: tuple[str, ...]
    """Network interfaces with an address, without loopback."""
    chosen_interface: str | None


def gather(runs_folder: Path, model_folder: Path | None) -> NodeFacts:
    """`runs_folder` exists. OSError where nothing can be written to it."""
    return NodeFacts(
        versions=versions(),
        code=code_digests(),
        model=sizes(model_folder) if model_folder else {},
        shm_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        open_files=open_files(),
        disk_bytes=shutil.disk_usage(runs_folder).free,
        disk_rate=disk_rate(runs_folder),
        extension=is_compiled(),
        gpus=gpus(),
        interfaces=interfaces(),
        chosen_interface=os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME"),
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def code_digests() -> dict[str, str]:
    found = {}
    for package in CODE:
        spec = importlib.util.find_spec(package)
        for place in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in sorted(place.rglob("*.py")):
                name = f"{package}/{file.relative_to(place).as_posix()}"
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return found


def sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.glob("*") if file.is_file()}


def open_files() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def disk_rate(folder: Path) -> float:
    path = folder / f"speed-{socket.gethostname()}-{os.getpid()}"
    data = os.urandom(SAMPLE)
    began = time.monotonic()
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return SAMPLE / (time.monotonic() - began)
    finally:
        path.unlink(missing_ok=True)


def is_compiled() -> bool:
    from rlhf.distributed.engine import prepare_environment

    prepare_environment()
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions"
    return any(Path(folder).rglob("deepspeed_shm_comm*.so"))


def gpus() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return tuple(line.strip().replace(", ", ", driver ") for line in listing.splitlines() if line.strip())
    return ()


def interfaces() -> tuple[str, ...]:
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return tuple(
        sorted(
            name
            for name, addresses in psutil.net_if_addrs().items()
            if name in up
            and any(one.family == socket.AF_INET and not one.address.startswith("127.") for one in addresses)
        )
    )
