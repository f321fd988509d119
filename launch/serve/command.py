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
from typing import TYPE_CHECKING

from rlhf.config import without_secrets
from rlhf.errors import UserError

if TYPE_CHECKING:
    from launch.serve.build import Plan

TOKEN = "RLHF_SERVE_TOKEN"


def run(args: argparse.Namespace) -> int:
    check_installed()
    token = _token(args.host)
    if args.ray_address is None:
        _check_port(args.host, args.port)
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm: vLLM is not installed (`make vllm` installs it)")

    from launch.serve.build import Plan

    plan = Plan.of(args, token)
    if args.replicas > 1 or args.ray_address is not None:
        from launch.serve.replicas import serve_replicas

        return serve_replicas(plan, lambda: _announce(plan))

    from launch.serve.server import serve

    writer = plan.writer()
    service = plan.service(writer)
    service.scoring = plan.scoring(writer)
    _announce(plan)
    plan.follow(service)
    serve(service, args.host, args.port)
    return 0


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


def _announce(plan: Plan) -> None:
    """The token is shown where nobody has chosen it."""
    host, given = plan.args.host, bool(os.environ.get(TOKEN, "").strip())
    address = f"http://{f'[{host}]' if ':' in host else host}:{plan.args.port}"
    print(f"{', '.join(plan.sources)}: {address}/v1")
    print(f"page: {address}/?token={'…' if given else plan.token}")
    if not given:
        print(f"token (new at each start; {TOKEN} chooses one): {plan.token}")
    print(f"kept: {f'exchanges and votes, in {without_secrets(plan.store)}' if plan.store else 'nothing'}")
    if plan.store and plan.rewards:
        print(f"scored by: {', '.join(plan.rewards)}")
    sys.stdout.flush()
