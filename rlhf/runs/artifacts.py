"""Artifacts, which pass between stages: folders whose manifest is written last, so a folder with one is complete."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.runs.storage import patiently

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20
HASHED_AT_ONCE = 8  # files


@dataclass(frozen=True)
class Artifact:
    kind: str  # "sft", "reward/helpfulness", "ppo"
    path: Path  # the folder; not in the manifest, so it can be renamed
    digest: str  # of the kind and every file's name and content
    parents: dict[str, str]  # name of each artifact or data set it was made from -> its digest
    config_digest: str
    code_revision: str
    metrics: dict[str, Any]


def begin(folder: Path) -> Path:
    """Empties `folder` for a new artifact. An old manifest goes first, so a half-removed artifact is never complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def complete(
    folder: Path, kind: str, parents: Mapping[str, str], config_digest: str, metrics: Mapping[str, Any]
) -> Artifact:
    """Commits the files in `folder` with a manifest. UserError(4) if there are none, UserError(5) on a full disk."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    files = digests_of(folder, paths, to_disk=True)
    if not files:
        raise UserError(f"{folder} holds no files, so there is no {kind} artifact to complete.", 4)
    manifest = {
        "kind": kind,
        "digest": _digest(kind, files),
        "parents": dict(parents),
        "config_digest": config_digest,
        "code_revision": code_revision(),
        "metrics": plain(metrics),
        "files": files,
    }
    require_disk(folder, 2 * len(json.dumps(manifest)))
    sync_folders(folder)
    write_json(folder / MANIFEST, manifest)
    sync_folders(folder.parent)
    return _artifact(folder, manifest)


def link_tree(source: Path, target: Path) -> None:
    """Puts the files of `source` into the existing folder `target`, as hard links if the file system has them."""
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)  # a copy would write through a link that is there
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def load(folder: Path, *, verify: bool = False, sizes: bool = True, part: tuple[int, int] = (0, 1)) -> Artifact:
    """The artifact in `folder`; UserError(4) if it is missing or damaged. `verify` also hashes every file; without
    `sizes` only the manifest is read. `part` (i, n): of n callers the i-th, who hashes every n-th file."""
    manifest = _manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no complete artifact ({MANIFEST} is missing). Run the stage that makes it.", 4)
    if sizes:
        _check_files(folder, manifest, verify, part)
    return _artifact(folder, manifest)


def find(folder: Path, config_digest: str, parents: Mapping[str, str]) -> Artifact | None:
    """The artifact in `folder` if it was made from these settings and these parents, else None.

    UserError(4) if it should be usable but a file of it is missing or changed.
    """
    manifest = _manifest(folder)
    if manifest is None or manifest["config_digest"] != config_digest or manifest["parents"] != dict(parents):
        return None
    _check_files(folder, manifest, verify=False)
    return _artifact(folder, manifest)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path, *, to_disk: bool = False) -> str:
    """SHA-256 of a file, read in pieces; `to_disk` also waits until its content is on the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
        if to_disk:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def digests_of(folder: Path, paths: Sequence[Path], *, to_disk: bool = False) -> dict[str, dict[str, Any]]:
    """Name in `folder` → size and SHA-256 of each file."""
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:  # hashing and reading release Python's lock
        digests = pool.map(partial(sha256_of, to_disk=to_disk), paths)
        return {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }


def damage(folder: Path, files: Mapping[str, Mapping[str, Any]], *, verify: bool) -> str:
    """The first file that is not as `digests_of` recorded it and what is wrong with it, "" if there is none.

    Sizes are always compared; `verify` also hashes the content.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
    if verify:
        now = digests_of(folder, [folder / name for name in files])
        for name, entry in files.items():
            if now[name]["sha256"] != entry["sha256"]:
                return f"{name} has other content than when it was committed"
    return ""


def sync_folders(folder: Path) -> None:
    """Waits until the names in `folder` and in its subfolders are on the disk, as those of new files otherwise need not be."""
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@cache
def code_revision() -> str:
    """Git commit of this code, with `+changes` when tracked files differ; outside git the version of the package."""
    here = Path(__file__).parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # not just inside another repository
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
        return _git(here, "rev-parse", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return f"rlhf-pipeline {metadata.version('rlhf-pipeline')}"
    except metadata.PackageNotFoundError:
        return "unknown"


def code_diff() -> str:
    """`git diff HEAD` of this code; empty when nothing was changed or this is not a git checkout."""
    if not code_revision().endswith("+changes"):
        return ""
    return _git(Path(__file__).parent.parent, "diff", "HEAD")


def require_disk(folder: Path, needed: int) -> None:
    """UserError(5) unless the disk under `folder` has `needed` bytes free."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"Not enough disk space for {folder}: {_size(needed)} needed, {_size(free)} free. "
            "Free some space, or set runs_dir to another disk.",
            5,
        )


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Writes `value` as JSON. A reader sees the old file or the new one, never a part."""
    write_atomic(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", durable=durable)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Writes next to `path`, waits for the disk if `durable`, and renames. UserError(5) on a full disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content

    def write() -> None:
        with partial.open("wb") as stream:
            stream.write(data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(path)

    try:
        patiently(write, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full: {path} could not be written. Free some space and run again.", 5
            ) from None
        raise


def plain(value: Any) -> Any:
    """`value` in JSON types: NaN and infinities become null, NumPy and torch scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest.keys() >= {"kind", "digest", "parents", "config_digest", "code_revision", "metrics", "files"}:
            return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is not the manifest of an artifact. Remove {folder} and run the stage again.", 4)


def _digest(kind: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    return digest_of({"kind": kind, "files": {name: entry["sha256"] for name, entry in files.items()}})


def _check_files(folder: Path, manifest: Mapping[str, Any], verify: bool, part: tuple[int, int] = (0, 1)) -> None:
    files, (first, step) = manifest["files"], part
    fault = damage(folder, {name: files[name] for name in sorted(files)[first::step]}, verify=verify)
    if verify and not fault and manifest["digest"] != _digest(manifest["kind"], files):
        fault = f"{MANIFEST} has other content than when it was written"
    if fault:
        raise UserError(f"The artifact in {folder} is damaged: {fault}. Remove {folder} and run again.", 4)


def _artifact(folder: Path, manifest: Mapping[str, Any]) -> Artifact:
    fields = ("kind", "digest", "parents", "config_digest", "code_revision", "metrics")
    return Artifact(path=folder, **{field: manifest[field] for field in fields})


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True).stdout


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
