"""What is outside the cluster: the tracking server, and models behind a licence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.doctor.result import CheckResult, ok
from rlhf.config import RunConfig
from rlhf.tracking import public_uri

Reached = Mapping[str, tuple[str, str] | None]
"""Node → what is wrong with the tracking store, and what to do."""


def tracking(config: RunConfig, reached: Reached) -> Iterator[CheckResult]:
    if (uri := config.tracking.uri) is None:
        yield ok("tracking", "files alone (tracking.uri: null)")
        return
    problems = {
        problem: [node for node in reached if reached[node] == problem] for problem in reached.values() if problem
    }
    for (text, remedy), where in problems.items():
        named = "all nodes" if len(where) == len(reached) > 1 else ", ".join(where)
        yield CheckResult("tracking", named, "failed", f"{public_uri(uri)}: {text}", remedy, 8)
    if any(reached.values()):
        return
    if uri.startswith("sqlite:") and len(reached) > 1:
        text = "SQLite on storage that several machines share may be damaged by its locks"
        yield CheckResult("tracking", "", "warning", text, "run `mlflow server` and set tracking.uri to its address")
    else:
        yield ok("tracking", f"{public_uri(uri)} answers")


def gate(config: RunConfig) -> Iterator[CheckResult]:
    """Whether a model of the hub may be loaded with the token that is set."""
    name = config.model.path
    if name == "tiny" or Path(name).expanduser().exists() or "/" not in name:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().auth_check(name)
        yield ok("model's hub", f"{name} may be loaded")
    except GatedRepoError:
        remedy = f"accept its licence at huggingface.co/{name}, and set HF_TOKEN on every node"
        yield CheckResult(
            "model's hub", name, "failed", "it is behind a licence that your token has not accepted", remedy, 4
        )
    except RepositoryNotFoundError:
        remedy = "mend model.path; a private model needs HF_TOKEN"
        yield CheckResult("model's hub", name, "failed", "the hub has no such model for you", remedy, 4)
    except Exception as error:  # noqa: BLE001  no network, a busy hub
        text = f"the hub cannot be asked: {type(error).__name__}"
        yield CheckResult(
            "model's hub", name, "warning", text, "make sure that the model lies in the cache of every node"
        )
