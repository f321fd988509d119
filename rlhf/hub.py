"""Models of the hub, in this machine's cache. `owner/name@revision` names a branch, a tag or a commit."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

NAME = re.compile(r"[\w-][\w.-]*(?:/[\w.-]+)?(?:@[\w./-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = ["*.safetensors"]
MISSING_MODEL, NOT_REACHED = 4, 8


def is_of_hub(name: str) -> bool:
    """Whether a model's name stands for one of the hub, because there is no such file or folder."""
    return name != "tiny" and NAME.fullmatch(name) is not None and not Path(name).expanduser().exists()


def commit_of(name: str) -> str:
    """The commit that a name stands for, asked once per process. Where the hub cannot be reached, that of the cache."""
    _, _, revision = name.partition("@")
    return revision if COMMIT.fullmatch(revision) else _commit_now(name)


def pinned(name: str) -> str:
    """The name with its commit, which will always be the same model."""
    return f"{name.partition('@')[0]}@{commit_of(name)}"


def folder(name: str, weights: bool = True) -> Path:
    """The folder of a model in the cache, downloaded if it is not there. Asks the hub nothing about what is there.

    UserError: 4 for a model that the hub does not have or does not give to you, 8 for a hub that cannot be reached.
    """
    return _snapshot(pinned(name), FILES + WEIGHTS if weights else FILES)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model; 0 where that is not known."""

    weights: int = 0
    missing: int = 0  # in the cache


def sizes(name: str) -> Sizes:
    from huggingface_hub import snapshot_download

    repository, _, revision = pinned(name).partition("@")
    try:
        files: Any = snapshot_download(repository, revision=revision, allow_patterns=FILES + WEIGHTS, dry_run=True)
    except OSError:  # without the hub
        return Sizes()
    return Sizes(
        sum(file.file_size or 0 for file in files if Path(file.filename).suffix == ".safetensors"),
        sum(file.file_size or 0 for file in files if file.will_download),
    )


def cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


@functools.cache
def _commit_now(name: str) -> str:
    return _snapshot(name, FILES).name


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    with _explained(name):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    from httpx2 import HTTPError
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        repository = name.partition("@")[0]
        text = f"accept its licence at {constants.ENDPOINT}/{repository}, and log in by `hf auth login` or set HF_TOKEN"
        raise UserError(
            f"{name} is behind a licence that your token has not accepted: {text}", MISSING_MODEL
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UserError(_absent(name, _first_line(error)), MISSING_MODEL) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, HTTPError) as error:
        if constants.HF_HUB_OFFLINE:
            text = f"{name} is no folder here, and not complete in the local cache of the hub (HF_HUB_OFFLINE)"
            raise UserError(text, MISSING_MODEL) from error
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(_absent(name, _first_line(error)), MISSING_MODEL) from error
        cause = error.__cause__ or error
        raise UserError(
            f"the hub cannot be reached ({constants.ENDPOINT}: {_first_line(cause)}), and {name} is not complete in the "
            "cache of this machine: run again when it can be, or give the model as a folder",
            NOT_REACHED,
        ) from error


def _absent(name: str, reason: str) -> str:
    return f"there is no model {name!r}: no folder {Path(name).absolute()}, and the hub gave none ({reason})"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
