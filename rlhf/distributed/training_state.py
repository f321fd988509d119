"""Weights, optimizer state and schedule of a model in training, in files that any number of ranks can read.

A rank writes the fragments that it holds: for each trainable parameter a range of its elements, flattened, with the range
of each state of the optimizer. To load, a rank takes from all files what overlaps with its own fragments. So it does not
matter how many ranks wrote and how they shared the parameters. Frozen parameters are not written: they come from where
they came from before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.distributed import collectives
from rlhf.distributed.tensor_files import load_tensors
from rlhf.errors import UserError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True)
class Fragment:
    """A range of a parameter, flattened, and where the optimizer of this rank has it."""

    name: str
    start: int  # within the parameter
    flat: Tensor  # what the optimizer updates; may hold fragments of many parameters
    offset: int  # within `flat`
    size: int

    def within(self, tensor: Tensor) -> Tensor:
        """The range in `flat`, or in a state of the optimizer for it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


def save(folder: Path, module: nn.Module, optimizer: Any, schedule: Any) -> None:
    """Writes this rank's fragments. All ranks must call it. `optimizer`: torch's AdamW, or DeepSpeed's around it."""
    if _zero(optimizer) is None and collectives.rank() > 0:
        return  # the first rank has all of it
    folder.mkdir(parents=True, exist_ok=True)
    adam = _adam(optimizer)
    state: dict[str, Any] = {"start": {}, WEIGHT: {}, **{moment: {} for moment in MOMENTS}}
    for one in _fragments(module, optimizer):
        state["start"][one.name] = one.start
        state[WEIGHT][one.name] = one.within(one.flat)
        for moment in MOMENTS:
            if one.flat in adam.state:
                state[moment][one.name] = one.within(adam.state[one.flat][moment])
    if collectives.rank() == 0:
        steps = {int(of_flat["step"]) for of_flat in adam.state.values()}
        state["step"] = max(steps, default=0)
        state["schedule"] = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
        state["buffers"] = _buffers(module)
    torch.save(state, folder / _file(collectives.rank()))


def load(folder: Path, module: nn.Module, optimizer: Any, schedule: Any) -> None:
    """Loads what ranks have saved, of whatever number. All ranks must call it.

    UserError (4) for files that are not of this model or cannot be trusted.
    """
    paths = sorted(folder.glob(_file("*")), key=lambda path: int(path.stem.rpartition("-")[2]))
    if not paths:
        raise UserError(f"{folder} holds no training state. Remove the checkpoint and run again.", 4)
    saved = [load_tensors(path) for path in paths]
    _prepare(optimizer)
    fragments = list(_fragments(module, optimizer))
    _make_states(_adam(optimizer), fragments, saved[0]["step"])
    for one in fragments:
        if missing := one.size - _fill(one, _adam(optimizer), saved):
            raise UserError(f"{folder} lacks {missing} elements of {one.name}. Remove the checkpoint and run again.", 4)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in saved[0]["buffers"]:
                buffer.copy_(saved[0]["buffers"][name])
    schedule.load_state_dict(schedule.state_dict() | saved[0]["schedule"])
    for group, lr in zip(_adam(optimizer).param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    _publish(module, optimizer, fragments)


def _file(rank: int | str) -> str:
    return f"rank-{rank}.pt"


def _adam(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside the wrappers of DeepSpeed and accelerate."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _zero(optimizer: Any) -> Any:
    """DeepSpeed's optimizer, which shares the parameters over ranks; None where each rank has all of them."""
    while optimizer is not None:
        if hasattr(optimizer, "fp32_partitioned_groups_flat") or hasattr(optimizer, "single_partition_of_fp32_groups"):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _fragments(module: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    """What this rank's optimizer holds of each trainable parameter."""
    zero = _zero(optimizer)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero is None:
            yield Fragment(name, 0, parameter, 0, parameter.numel())
        elif _is_stage_3(zero):
            group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = padded * collectives.rank()
            size = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if size > 0:
                yield Fragment(name, start, zero.fp32_partitioned_groups_flat[group], offset, size)
        elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Fragment(name, there.start, flat, here.start, here.numel)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state."""
    kept = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _make_states(adam: torch.optim.Optimizer, fragments: list[Fragment], step: int) -> None:
    """The optimizer makes its states in its first step, which was made before."""
    if step == 0:
        adam.state.clear()
        return
    for flat in {id(one.flat): one.flat for one in fragments}.values():
        moments = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
        adam.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **moments}


@torch.no_grad()
def _fill(one: Fragment, adam: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> int:
    """Copies into a fragment what the files have of it; returns the number of elements."""
    filled = 0
    for state in saved:
        if one.name not in state["start"]:
            continue
        theirs, first = state[WEIGHT][one.name].numel(), state["start"][one.name]
        begin, end = max(one.start, first), min(one.start + one.size, first + theirs)
        if begin >= end:
            continue
        moments = {key: adam.state[one.flat][key] for key in MOMENTS} if one.flat in adam.state else {}
        for key, into in {WEIGHT: one.flat, **moments}.items():
            target = one.within(into).narrow(0, begin - one.start, end - begin)
            target.copy_(state[key][one.name].narrow(0, begin - first, end - begin))
        filled += end - begin
    return filled


def _prepare(optimizer: Any) -> None:
    """Under ZeRO-3 small parameters are kept whole on all ranks; they are shared out before they are loaded."""
    zero = _zero(optimizer)
    if zero is not None and _is_stage_3(zero):
        zero.checkpoint_event_prologue()


@torch.no_grad()
def _publish(module: nn.Module, optimizer: Any, fragments: list[Fragment]) -> None:
    """Copies the weights from the optimizer to the model."""
    zero = _zero(optimizer)
    if zero is None:
        return
    if not _is_stage_3(zero):
        zero.update_lp_params()
        return
    parameters = dict(module.named_parameters())
    for one in fragments:
        parameters[one.name].ds_tensor.narrow(0, 0, one.size).copy_(one.within(one.flat))  # type: ignore[attr-defined]
    zero.checkpoint_event_epilogue()
