"""A process group that listens on the loopback interface only, where no other machine can reach it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train._internal.utils import get_address_and_port
from ray.train.torch import config as of_ray

HOST = "127.0.0.1"


@dataclass
class LoopbackConfig(of_ray.TorchConfig):
    """A process group whose store listens on the loopback interface; torch's own listens on all."""

    @property
    def backend_cls(self) -> type[of_ray._TorchBackend]:
        return _Backend


class _Backend(of_ray._TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        on_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        _, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(of_ray._set_torch_distributed_env_vars)
        ranks = len(worker_group)
        rest = ranks, port, "nccl" if on_gpus else "gloo", backend_config.timeout_s
        ray.get([worker_group.execute_single_async(rank, join, rank, *rest) for rank in range(ranks)])


def join(rank: int, ranks: int, port: int, backend: str, timeout_s: int) -> None:
    """Joins the process group of all ranks on this machine."""
    os.environ |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
    timeout = timedelta(seconds=timeout_s)
    listener = socket.create_server((HOST, port)).detach() if rank == 0 else None
    store = dist.TCPStore(HOST, port, ranks, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listener)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
