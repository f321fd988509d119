"""Writes the weights of a model that may be sharded, file by file: no process ever holds the whole of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from rlhf.distributed import collectives
from rlhf.distributed.engine import full_parameters

FILE_BYTES = 2_000_000_000  # safetensors may copy what it writes, and files are hashed in parallel
INDEX = "model.safetensors.index.json"
HEAD = "head.weight"  # of a ScalarModel
State = dict[str, Tensor]


def save_weights(
    module: nn.Module, model: Any, folder: Path, finish: Callable[[State], State], *, all_ranks: bool
) -> State:
    """config.json and the safetensors of the transformers `model`, with the weights of `module`. Returns the weights of
    adapters and of a score head, whole, on the first rank.

    `finish` makes weights of `model` of whole layers of `module`. With `all_ranks`, which all must call, the files are
    dealt out to the ranks, and each copies and writes its own while the weights are gathered one bucket after another.
    Otherwise this process writes alone, and `module` must be whole.
    """
    rank, ranks = (collectives.rank(), collectives.world_size()) if all_ranks else (0, 1)
    first_rank(lambda: model.save_pretrained(folder, state_dict={}), folder, all_ranks)
    files = planned_files(sizes_of(module), FILE_BYTES)
    names = file_names(len(files))
    mine = {names[number]: files[number] for number in range(rank, len(files), ranks)}
    aside: State = {}
    weights = kept(whole_weights(module), aside if rank == 0 else None)
    placed, fault = write_files(folder, weights, mine, lambda state: revert_weight_conversion(model, finish(state)))
    said = collectives.gather_objects((placed, fault)) if all_ranks else [(placed, fault)]
    for number, (_, text) in enumerate(said):
        if text:
            raise RuntimeError(f"rank {number} failed while saving a model to {folder}: {text}")
    entries = [place for places, _ in said for place in places.items()]
    if len(files) > 1:
        first_rank(lambda: write_index(folder, entries), folder, all_ranks)
    return aside


def first_rank(work: Callable[[], Any], folder: Path, all_ranks: bool) -> None:
    """`work` on `folder`, on the first of all ranks while the others wait, or here alone."""
    if all_ranks:
        collectives.rank_zero_only(work, f"saving a model to {folder}")
    else:
        work()


def sizes_of(module: nn.Module) -> dict[str, int]:
    """Bytes of every weight, whole, in the order of `whole_weights`."""
    sizes = {n: getattr(p, "ds_numel", p.numel()) * p.element_size() for n, p in module.named_parameters()}
    return sizes | {name: buffer.nbytes for name, buffer in saved_buffers(module)}


def whole_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers; copy each before taking the next."""
    yield from full_parameters(module)
    yield from saved_buffers(module)


def saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    saved = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in saved]


def kept(weights: Iterable[tuple[str, Tensor]], aside: State | None) -> Iterator[tuple[str, Tensor]]:
    """The same weights; those of adapters and of a score head are also copied to `aside`."""
    for name, tensor in weights:
        if aside is not None and (".lora_" in name or name == HEAD):
            aside[name] = tensor.to("cpu", copy=True)
        yield name, tensor


def planned_files(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names of each file's weights. A layer stays in one file: its adapters are merged there, and its experts
    divided. So a file is larger than `limit` if a layer is."""
    layers: dict[str, list[str]] = {}
    for name in sizes:
        layers.setdefault(layer_of(name), []).append(name)
    files: list[list[str]] = [[]]
    filled = 0
    for names in layers.values():
        size = sum(sizes[name] for name in names)
        if filled and filled + size > limit:
            files.append([])
            filled = 0
        files[-1] += names
        filled += size
    return files


def layer_of(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight → model.layers.3; a part outside of the layers stands alone, with its adapter."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered[0] if numbered else re.split(r"\.(?:base_layer|lora_)", name)[0]


def file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_files(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    files: Mapping[str, Sequence[str]],
    finish: Callable[[State], State],
) -> tuple[dict[str, tuple[str, int]], str]:
    """Writes `files`, file name → names of its weights, while `weights` pass by. Returns (file and bytes of every weight
    that was written, what went wrong).

    A file is written in a thread while the next one fills. After a fault the rest still passes by, because the other
    ranks gather the weights too.
    """
    file_of = {name: file for file, names in files.items() for name in names}
    filling: dict[str, State] = {}
    placed: dict[str, tuple[str, int]] = {}
    fault = ""
    writing: Future[dict[str, tuple[str, int]]] | None = None
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        for name, tensor in weights:
            if fault or (file := file_of.get(name)) is None:
                continue
            state = filling.setdefault(file, {})
            state[name] = tensor.to("cpu", copy=True)
            if len(state) == len(files[file]):
                fault = collect(writing, placed)
                writing = pool.submit(write_file, folder / file, filling.pop(file), finish)
        fault = fault or collect(writing, placed)
    return placed, fault


def collect(writing: Future[dict[str, tuple[str, int]]] | None, placed: dict[str, tuple[str, int]]) -> str:
    """Waits for a file and adds its weights to `placed`; returns what went wrong."""
    try:
        placed.update(writing.result() if writing else {})
    except Exception as error:  # noqa: BLE001  every rank raises it
        return repr(error)
    return ""


def write_file(path: Path, state: State, finish: Callable[[State], State]) -> dict[str, tuple[str, int]]:
    """Returns file and bytes of every weight."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in finish(state).items()}
    state.clear()
    save_file(weights, path, metadata={"format": "pt"})
    return {name: (path.name, tensor.nbytes) for name, tensor in weights.items()}


def write_index(folder: Path, entries: Sequence[tuple[str, tuple[str, int]]]) -> None:
    """Which file holds which weight, in the form of transformers."""
    index = {
        "metadata": {"total_size": sum(size for _, (_, size) in entries)},
        "weight_map": dict(sorted((name, file) for name, (file, _) in entries)),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
