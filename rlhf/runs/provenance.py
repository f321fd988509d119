"""What an artifact was made from: settings, data, parents. A stage with equal provenance is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import RunConfig
from rlhf.data import Split, hold_out_everywhere, load_demonstrations, load_preferences, load_prompts, parsed
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.runs import artifacts, claim
from rlhf.runs.artifacts import Artifact, digest_of
from rlhf.runs.chat_format import message_check
from rlhf.runs.context import StageContext
from rlhf.user_code import source_digest

LOADERS = {"demonstrations": load_demonstrations, "preferences": load_preferences, "prompts": load_prompts}


def parse_data(config: RunConfig) -> dict[str, Split]:
    """The data of the run from the user's files, by role. Every role is read, because no role may train on what another
    holds out.

    UserError (3) for data that cannot be used.
    """
    validate = message_check(config)
    named = {role: load for role, load in LOADERS.items() if getattr(config.data, role) is not None}
    return hold_out_everywhere({role: load(config, validate) for role, load in named.items()}, config.data)


def ensure_data(config: RunConfig) -> None:
    """Lets the first rank parse the data if no driver has done so. All ranks must call it."""

    def work() -> None:
        if parsed.manifest(config) is None:
            parsed.write(config, parse_data(config))

    collectives.rank_zero_only(work, "reading the data")


def stage_data(config: RunConfig, roles: Sequence[str]) -> dict[str, Split]:
    """The data of `roles`, those of a stage. All ranks must call it. UserError (3) for data that cannot be used."""
    ensure_data(config)
    return parsed.read(config, roles)


def stage_settings(config: RunConfig, stage: str, roles: Sequence[str]) -> dict[str, Any]:
    """The settings that affect the result of `stage`: others may change without making it stale.

    Paths of data do not count (their digests do), nor the number of workers, nor limits of alarms.
    """
    whole = config.model_dump(mode="json")
    kind, _, name = stage.partition("/")
    own = whole.get(kind, {}) | ({"models": whole["reward"]["models"][name]} if name else {})
    own.pop("alarms", None)
    keys = [*roles, "bad_rows", "shared_prompts", "held_out_fraction", *(["gold"] if "prompts" in roles else [])]
    data = {key: whole["data"][key] for key in keys}
    if code := _code_of(config) if kind == "ppo" else {}:
        own["code"] = code
    return {
        "model": whole["model"],
        "seed": config.seed,
        "precision": config.hardware.precision,
        "data": data,
        kind: own,
    }


def _code_of(config: RunConfig) -> dict[str, str]:
    """Digests of the user's own code: a reward that changed makes PPO stale."""
    named = [source.function for source in config.ppo.rewards.values() if source.function]
    named += [config.ppo.advantage] if ":" in config.ppo.advantage else []
    return {code: source_digest(code) for code in named}


def settings_digest(config: RunConfig, stage: str, roles: Sequence[str]) -> str:
    """Without micro-batches, which follow from the number of workers and change no result."""
    settings, kind = stage_settings(config, stage, roles), stage.partition("/")[0]
    own = {key: value for key, value in settings[kind].items() if key not in ("micro_batch_size", "micro_batch_tokens")}
    return digest_of(settings | {kind: own})


def parents(data: Mapping[str, Split], inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """Digests of everything that a stage was made from: artifacts by stage, data by role and source."""
    sources = {f"{role}: {name}": digest for role, split in data.items() for name, digest in split.digests.items()}
    return {name: artifact.digest for name, artifact in inputs.items()} | sources


def inputs_of(parents: Mapping[str, str]) -> dict[str, str]:
    """The artifacts among `parents`; the others are data, `role: source`."""
    return {name: digest for name, digest in parents.items() if ": " not in name}


def verified(folder: Path) -> Artifact:
    """The artifact in `folder`, each of whose files one of the ranks has hashed. All ranks must call it.

    UserError (4) on every rank if it is missing, or if a file is not as it was when the artifact was made.
    """
    artifact = collectives.broadcast_result(lambda: artifacts.load(folder))
    fault = ""
    try:
        artifacts.load(folder, verify=True, part=(collectives.rank(), collectives.world_size()))
    except UserError as error:
        fault = error.message
    for said in collectives.gather_objects(fault):
        if said:
            raise UserError(said, 4)
    return artifact


def commit(
    config: RunConfig,
    context: StageContext,
    parents: Mapping[str, str],
    metrics: Mapping[str, Any],
    *,
    weights: Callable[[Path], None] = lambda folder: None,
    write: Callable[[Path], None] = lambda folder: None,
) -> Artifact:
    """Commits the stage's artifact. All ranks must call it.

    All ranks fill its folder with `weights`; then rank 0 adds the other files with `write`, adds the manifest, and
    removes checkpoints.
    """
    folder = context.artifact_folder
    digest = settings_digest(config, context.stage, context.roles)

    def begin() -> None:
        claim.require()
        artifacts.begin(folder)

    def complete() -> None:
        write(folder)
        claim.require()
        artifacts.complete(folder, context.stage, parents, digest, metrics)
        shutil.rmtree(context.checkpoint_folder, ignore_errors=True)

    collectives.rank_zero_only(begin, f"emptying {folder}")
    weights(folder)
    collectives.rank_zero_only(complete, f"writing {folder}")
    return collectives.broadcast_result(lambda: artifacts.load(folder))
