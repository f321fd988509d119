"""`rlhf serve`: loads the models, says where they are, and serves."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import ipaddress
import os
import re
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands.arguments import tracking_uri
from launch.serve.source import Source, digest_of, resolved
from rlhf.config import PPOConfig
from rlhf.errors import UserError

if TYPE_CHECKING:
    from launch.serve.background import BackgroundScoring
    from launch.serve.guard import Guard
    from rlhf.serving.store import Writer
    from rlhf.serving.watch.baseline import Baseline

TOKEN = "RLHF_SERVE_TOKEN"


def run(args: argparse.Namespace) -> int:
    check_installed()
    token = _token(args.host)
    _check_port(args.host, args.port)
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm: vLLM is not installed (`make vllm` installs it)")
    uri = tracking_uri(args)
    sources = {name.rstrip("/"): resolved(name, uri) for name in args.models}

    from launch.serve.gate import Limits
    from launch.serve.reload import Reloader
    from launch.serve.rewards import reward_folders
    from launch.serve.server import serve
    from launch.serve.service import Service
    from rlhf.serving.model import ServedModel

    def load(name: str, source: Source) -> ServedModel:
        return ServedModel(name, source.folder, args.queue, digest_of(source.folder), source.version, args.engine)

    policy = next(iter(sources.values())).folder
    guard, rewards = _guard(args, uri), reward_folders(args.reward, policy)
    writer = _writer(args, policy)
    models = {name: load(name, source) for name, source in sources.items()}
    service = Service(models, token, args.system_prompt, args.max_tokens, Limits(per_minute=args.rate), writer, guard)
    service.scoring, service.baseline = _scoring(writer, rewards), _baseline(policy)
    _announce(args.host, args.port, token, list(models))
    print(f"kept: {f'exchanges and votes, in {writer.store.shown}' if writer else 'nothing'}", flush=True)
    if service.scoring:
        print(f"scored by: {', '.join(rewards)}", flush=True)
    aliases = {name: source.alias for name, source in sources.items() if source.alias}
    if uri and aliases:
        Reloader(service, aliases, uri, load).start()
    serve(service, args.host, args.port)
    return 0


def _baseline(policy: Path) -> Baseline | None:
    """The evaluation of a run's policy: what the dashboard compares with."""
    from rlhf.serving.watch import baseline

    folder = baseline.usual(policy.absolute().parents[1]) if policy.name == "artifact" else None
    return baseline.read(folder) if folder else None


def _scoring(writer: Writer | None, rewards: dict[str, Path]) -> BackgroundScoring | None:
    if writer is None or not rewards:
        return None
    from launch.serve.background import BackgroundScoring
    from launch.serve.scoring import RewardModel

    return BackgroundScoring(writer, {name: RewardModel(folder) for name, folder in rewards.items()})


def _guard(args: argparse.Namespace, uri: str | None) -> Guard | None:
    if args.guard is None:
        for option in ("threshold", "action"):
            if getattr(args, f"guard_{option}") is not None:
                raise UserError(f"--guard-{option} is about a guard: name its safety model with --guard")
        return None
    from launch.serve.guard import Guard
    from launch.serve.scoring import RewardModel

    model = RewardModel(resolved(args.guard, uri).folder)
    if not model.has_logits:
        raise UserError(f"--guard {args.guard}: a DPO policy says nothing of safety; name a reward model", 4)
    threshold = PPOConfig.model_fields["safety_threshold"].default
    threshold = threshold if args.guard_threshold is None else args.guard_threshold
    return Guard(model, threshold, args.guard_action or "refuse")


def _writer(args: argparse.Namespace, folder: Path) -> Writer | None:
    from launch.serve.feedback import default_store, store_url
    from rlhf.serving.store import Store, Writer

    if args.store == "none":
        return None
    return Writer(Store(store_url(args.store or str(default_store(folder))), args.redact), args.keep_days)


def check_installed() -> None:
    try:
        import alembic  # noqa: F401
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import sqlalchemy  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"`rlhf serve` needs the extra serve ({error.name} is missing): pip install '.[serve]'"
        ) from None


def _token(host: str) -> str:
    """Of the environment, else a new one, which is enough where only this machine can connect. UserError (2)."""
    given = os.environ.get(TOKEN, "").strip()
    if given:
        if not re.fullmatch(r"[\x21-\x7e]+", given):
            raise UserError(f"{TOKEN}: a token is of visible ASCII characters, without spaces")
        return given
    if not _is_loopback(host):
        raise UserError(f"--host {host}: others can reach this address, so choose a token: set {TOKEN}")
    return secrets.token_urlsafe(24)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port(host: str, port: int) -> None:
    """Before models are loaded. UserError (5) where another process has the address, (2) where it is none of ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        remedy = "choose another --port" if taken else "choose an address of this machine"
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): {remedy}", 5 if taken else 2) from None


def _announce(host: str, port: int, token: str, models: list[str]) -> None:
    """The token is shown where nobody has chosen it."""
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    given = bool(os.environ.get(TOKEN, "").strip())
    print(f"{', '.join(models)}: {address}/v1")
    print(f"page: {address}/?token={'…' if given else token}")
    if not given:
        print(f"token (new at each start; {TOKEN} chooses one): {token}")
    sys.stdout.flush()
