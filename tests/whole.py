"""The whole weights of a model that may be sharded, for comparison."""

from torch import Tensor, nn

from rlhf.distributed.engine import full_parameters


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """All parameters on the CPU of every rank. All ranks must call it."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in full_parameters(module)}
