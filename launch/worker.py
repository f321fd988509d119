"""One rank of one stage: builds its context, runs the stage, and records how it ended.

The same code for Ray, for `torchrun` and for a single process.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rlhf.config import RunConfig, public, without_secrets
from rlhf.errors import UserError
from rlhf.runs.artifacts import Artifact, write_atomic, write_json
from rlhf.runs.storage import is_full
from stages.base import stage_of

FAILURE = "failure.json"
ATTEMPT_MARK = "--- the stage starts on this rank ---"  # in its log
PEERS_END_S = 1.0  # a killed process takes a moment to end
UNEXPECTED = 1  # exit code of an unexpected error


def run_rank(config: RunConfig, stage: str, local: bool, note: str = "", open_pool: Any = None) -> Artifact:
    """Runs `stage` as the rank that the environment names, which the caller guards. Records what the stage raises, and
    raises it.

    `note`: a line to show under the stage's bar. `open_pool`: as in StageContext.
    """
    import torch

    from rlhf.distributed import collectives
    from rlhf.distributed.engine import prepare_environment
    from rlhf.kernels import enable_kernels
    from rlhf.runs import claim
    from rlhf.tracking import open_tracker, status_of

    prepare_environment()
    enable_kernels()
    if not local:  # a single process uses all processors, or OMP_NUM_THREADS
        torch.set_num_threads(config.hardware.cpus_per_worker)
    folder = config.folder / stage
    is_writer = collectives.rank() == 0
    tracker = open_tracker(folder, config.tracking, stage, "", is_writer)
    try:
        artifact = _run(config, stage, local, tracker, note, open_pool)
        if is_writer:
            _record_artifact(config, tracker, artifact)
        tracker.close("FINISHED")
        return artifact
    except BaseException as error:
        if (follower := claim.followed(config.folder)) is not None and not follower.is_wanted():
            raise  # nothing may be written any more
        note_failure(config, stage, error)
        tracker.close(status_of(error), _reason(error))
        raise


def _run(config: RunConfig, stage: str, local: bool, tracker: Any, note: str, open_pool: Any) -> Artifact:
    """Builds the context of this rank, checks what the stage starts from, and runs it."""
    import torch

    from rlhf.distributed import collectives
    from rlhf.models import resolve
    from rlhf.runs import provenance
    from rlhf.runs.chat_format import check_inputs
    from rlhf.runs.context import Progress, StageContext

    folder = config.folder / stage
    context = StageContext(
        stage=stage,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        device=_device(torch),
        folder=folder,
        inputs={
            name: provenance.verified(config.folder / name / "artifact") for name in stage_of(stage).inputs(config)
        },
        tracker=tracker,
        progress=Progress(folder, collectives.rank() == 0),
        local=local,
        roles=stage_of(stage).roles,
        open_pool=open_pool,
        sequence_parallel=1 if local else config.hardware.sequence_parallel,
    )
    if note:
        context.progress.warn(note)
    provenance.ensure_data(config)
    collectives.rank_zero_only(lambda: _record(config, context), "recording the settings")
    resolve(config)  # the first rank makes the tiny model
    check_inputs(config, {name: artifact.path for name, artifact in context.inputs.items()})
    return stage_of(stage).run(config, context)


@contextmanager
def torchrun_group(config: RunConfig) -> Iterator[None]:
    """The process group of the ranks that torchrun started: one per process lifetime, because DeepSpeed keeps it."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=config.hardware.collective_timeout_s)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def read_failure(folder: Path) -> UserError | None:
    """What a rank recorded when it failed; None if it could not."""
    with suppress(FileNotFoundError, ValueError):
        noted = json.loads((folder / FAILURE).read_text())
        return UserError(noted["message"], noted["exit_code"])
    return None


def memory_remedy(config: RunConfig, stage: str) -> str:
    """What to do where memory is short."""
    name = stage_of(stage).name
    by_tokens = getattr(getattr(config, name), "micro_batch_tokens", None) is not None
    return f"Lower {name}.micro_batch_{'tokens' if by_tokens else 'size'}, or give more."


def note_failure(config: RunConfig, stage: str, error: BaseException) -> None:
    """Only the first failing rank records why; the others fail because of it. It also looks which others are gone."""
    folder = config.folder / stage
    if (folder / FAILURE).exists():
        return
    message, code = _reason(error), UNEXPECTED
    if _is_out_of_memory(error):
        error = UserError(f"a worker ran out of memory ({message[:300]}). {memory_remedy(config, stage)}", 5)
        message = error.message
    if is_full(error):
        error = UserError(f"the disk of {folder} is full ({message[:300]}). Free some space and run again.", 5)
        message = error.message
    if isinstance(error, UserError):
        code = error.exit_code
    else:
        path = folder / "logs" / "traceback.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, without_secrets("".join(traceback.format_exception(error))))
        message += f"\nThe traceback is in {path}"
    with suppress(OSError, UserError):  # the disk may be full, and Ray tells the driver too
        write_json(folder / FAILURE, {"message": message, "exit_code": code, "dead": _gone_peers(folder, error)})


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text


def _gone_peers(folder: Path, error: BaseException) -> list[int]:
    """Ranks on this host whose process is gone: they were killed, and `error` may just be an echo of it."""
    from rlhf.runs import life

    attempts = [*(folder / life.FOLDER).glob("*")]
    if isinstance(error, UserError) or not attempts:
        return []
    time.sleep(PEERS_END_S)
    return [rank for rank, one in life.read(attempts[0]).items() if one.is_gone]


def _reason(error: BaseException) -> str:
    return without_secrets(error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


def _record(config: RunConfig, context: Any) -> None:
    """Records settings, inputs and their origin before the first step."""
    import yaml

    from rlhf.data import parsed
    from rlhf.runs import provenance

    settings = public(config)  # for people: no code reads it
    write_atomic(context.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    context.tracker.artifact(context.folder / "config.yaml")
    own = provenance.stage_settings(config, context.stage, context.roles)
    context.tracker.params(own | {"hardware": settings["hardware"]})
    data = parsed.manifest(config) or {}
    for role in context.roles:
        for name, digest in data[role]["digests"].items():
            context.tracker.dataset(name, name, digest, role)
        findings = "; ".join(data[role]["findings"])
        context.tracker.tags({f"findings.{role}": findings} if findings else {})
    context.tracker.tags({f"input.{name}": f"{a.path} {a.digest}" for name, a in context.inputs.items()})


def _record_artifact(config: RunConfig, tracker: Any, artifact: Artifact) -> None:
    from launch.logged_model import describe
    from rlhf.evaluation import held_out

    tracker.tags({"artifact.path": str(artifact.path), "artifact.digest": artifact.digest})
    tracker.model(describe(config, artifact))
    if (artifact.path / held_out.FILE).exists():
        tracker.artifact(artifact.path / held_out.FILE)


def _device(torch: Any) -> Any:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
