"""The weights of a model folder, one at a time, for an existing model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf.models.folders import find_model, is_adapter
from rlhf.models.pretrained import load_causal


def weights_that_fit(path: str | Path, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]] | None:
    """All weights of `shapes` on the CPU, as `load_causal` would load them from `path`; None if the names or shapes
    differ.

    Safetensors are read one by one. Adapters, other formats and embeddings that must grow need the whole model in main
    memory.
    """
    folder = find_model(path)
    places = {} if is_adapter(folder) else _places(folder, shapes)
    if places.keys() == shapes.keys():
        return ((name, _read(file, name)) for name, file in places.items())
    model: Any = load_causal(folder)
    found = dict(model.named_parameters())
    fits = {name: tensor.shape for name, tensor in found.items()} == dict(shapes)
    return iter(found.items()) if fits else None


def _places(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Path]:
    """The file of every weight that exists in its shape."""
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  no mapping
                if name in shapes and tuple(weights.get_slice(name).get_shape()) == tuple(shapes[name]):
                    places[name] = file
    return places


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as weights:
        return weights.get_tensor(name)
