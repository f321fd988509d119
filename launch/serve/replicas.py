"""`rlhf serve --replicas N`: as many processes as that on Ray, behind the one port of Ray Serve's proxy."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch import signals
from launch.serve.build import Plan
from launch.serve.merged_metrics import merged
from rlhf.config import without_secrets
from rlhf.errors import UserError

log = logging.getLogger(__name__)

APP, DEPLOYMENT = "rlhf", "replica"
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
MOST_ONGOING = 10_000  # of a replica: its own limits refuse before that
GRACE_S, PATIENCE_S, LOOK_S = 60.0, 10.0, 0.5
WATCH_S = 2.0  # between two looks at how many there are


class Replica:
    """One process: the server without its port. Ray starts it anew when it dies."""

    def __init__(self, args: argparse.Namespace, token: str, folder: str, beside: int, alone: bool) -> None:
        """`folder`: the driver's, for relative names. `beside`: how many share this machine's memory. `alone`: on a
        private Ray."""
        from launch.commands.arguments import silence_deepspeed
        from rlhf.serving import batch

        os.chdir(folder)
        if alone:
            _listen_on_loopback()
        silence_deepspeed()
        batch.CACHE_FRACTION /= beside
        plan = Plan.of(args, token)
        self._service = plan.service(plan.writer())
        self._service.others = _Others()
        plan.follow(self._service)

    def __serve_build_asgi_app__(self) -> Any:
        from launch.serve.app import make_app

        return make_app(self._service)

    def stop(self) -> None:
        self._service.stopping = True

    def active(self) -> int:
        return self._service.active

    def metrics(self) -> tuple[str, str]:
        from ray import serve

        return serve.get_replica_context().replica_tag, self._service.metrics.text().decode()


class _Others:
    """All replicas, asked from within one of them."""

    _handle: Any = None

    async def metrics(self) -> bytes:
        from ray import serve

        self._handle = self._handle or serve.get_deployment_handle(DEPLOYMENT, APP)
        found = await self._handle.broadcast("metrics").results_async(timeout_s=PATIENCE_S, return_exceptions=True)
        return merged(dict(each for each in found if not isinstance(each, BaseException))).encode()


def serve_replicas(plan: Plan, announce: Callable[[], None]) -> int:
    """Until a signal, which waits for those who are being answered; the second one does not. UserError (2, 5)."""
    _check_installed()
    from launch.connection import connection

    args = plan.args
    with (
        tempfile.TemporaryDirectory(prefix="rlhf-serve-") as folder,
        signals.handled(),
        connection(args.ray_address, Path(folder)),
    ):
        nodes = _nodes(plan)
        writer = plan.writer()  # brings the tables to the present form, before replicas do it side by side
        try:
            handle = _start(plan, nodes)
            scoring = plan.scoring(writer)  # in this process, so that each response is scored once
            announce()
            with signals.Stop().handled() as stop:
                _watch(args.replicas, stop)
                _drain(handle)
            if scoring:
                scoring.close()
        finally:
            _end()
            if writer:
                writer.close()
    return 0


def _check_installed() -> None:
    """Without an import: Ray reads the environment then, which is not ready yet."""
    if find_spec("grpc_reflection") is None:
        raise UserError("`rlhf serve --replicas` needs the extra serve-cluster: pip install '.[serve-cluster]'")


def _nodes(plan: Plan) -> list[Mapping[str, float]]:
    """What each node has. UserError (2, 5) where the replicas cannot be there."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    check_store(plan.store, len(nodes))
    try:
        ray.get_actor(CONTROLLER, NAMESPACE)
    except ValueError:
        return nodes
    raise UserError("Ray Serve runs on this cluster already; `serve shutdown` ends it and all that it serves", 5)


def check_store(store: str | None, machines: int) -> None:
    """UserError (2) for a file that several machines would write to."""
    if machines > 1 and store and store.startswith("sqlite"):
        raise UserError(
            f"--store {store}: {machines} machines cannot share a SQLite file; name a database with "
            "--store postgresql://…, or keep nothing with --store none"
        )


def resources(nodes: Sequence[Mapping[str, float]], replicas: int) -> dict[str, int]:
    """Of a replica: a GPU where there are some, else as many CPUs as let all of them fit. UserError (5)."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        if gpus < replicas:
            raise UserError(f"--replicas {replicas}: each needs a GPU, and Ray has {gpus}", 5)
        return {"num_cpus": 1, "num_gpus": 1}
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    fitting = [each for each in range(1, max(cpus) + 1) if sum(own // each for own in cpus) >= replicas]
    if not fitting:
        raise UserError(f"--replicas {replicas}: each needs a CPU, and Ray has {sum(cpus)}", 5)
    return {"num_cpus": max(fitting), "num_gpus": 0}


def _start(plan: Plan, nodes: Sequence[Mapping[str, float]]) -> Any:
    """Until all replicas serve. UserError (5) where they do not."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    args, alone = copy(plan.args), plan.args.ray_address is None
    args.rate = math.ceil(args.rate / args.replicas)  # each of them sees a part of the requests
    needed = resources(nodes, args.replicas)
    beside = 1 if needed["num_gpus"] else args.replicas
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    logs = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start("HeadOnly", HTTPOptions(host=args.host, port=args.port), logging_config=logs)
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name=DEPLOYMENT,
        num_replicas=args.replicas,
        max_ongoing_requests=MOST_ONGOING,
        ray_actor_options=needed,
        graceful_shutdown_wait_loop_s=LOOK_S,
        logging_config=logs,
    )
    try:
        return serve.run(deployment.bind(args, plan.token, os.getcwd(), beside, alone), name=APP)
    except RuntimeError as error:
        said = re.findall(r"UserError: (.*)", str(error)) or [str(error).strip().splitlines()[-1]]
        raise UserError(f"the replicas did not start: {without_secrets(said[-1])}", 5) from None


def _watch(replicas: int, stop: signals.Stop) -> None:
    from ray import serve

    before = replicas
    while not stop.number:
        stop.sleep(WATCH_S)
        app = serve.status().applications.get(APP)
        states = app.deployments[DEPLOYMENT].replica_states if app and DEPLOYMENT in app.deployments else {}
        if (now := sum(count for state, count in states.items() if state == "RUNNING")) != before:
            print(f"replicas: {now} of {replicas}", flush=True)
        before = now


def _drain(handle: Any) -> None:
    """New requests are refused while the others are answered."""
    deadline = time.monotonic() + GRACE_S
    try:
        handle.broadcast("stop").results(timeout_s=PATIENCE_S, return_exceptions=True)
        while time.monotonic() < deadline:
            active = handle.broadcast("active").results(timeout_s=PATIENCE_S, return_exceptions=True)
            if not any(each for each in active if not isinstance(each, BaseException)):  # a dead one answers nobody
                return
            time.sleep(LOOK_S)
    except TimeoutError:
        log.warning("the replicas do not answer; they are stopped")


def _end() -> None:
    """Also on a cluster, which Ray Serve would outlive."""
    from ray import serve

    serve.shutdown()


def _listen_on_loopback() -> None:
    """Ray Serve opens the port between its processes on all interfaces, and has no setting for that."""
    from ray.serve._private import replica

    usual = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, _: usual(server, "127.0.0.1:0")
