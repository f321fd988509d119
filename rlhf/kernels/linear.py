"""Matrix products with fixed weights, packed once for the CPU's kernels.

On a CPU, oneDNN uses its own blocked layout. Given a plain matrix it converts it at every call, and torch hands float32
to MKL, which is slower on CPUs that are not Intel's. On a GPU a plain matrix is used.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

_SUPPORTED = {torch.float32, torch.bfloat16}


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN is available and has kernels for this weight."""
    if weight.device.type != "cpu" or weight.dtype not in _SUPPORTED or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear:
    """x_NI → x_NI · weight_OIᵀ without bias, optionally fused with what follows. No gradient.

    The packed weight is a copy: it does not follow later changes of the weight.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self.packed = can_pack(weight_OI)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI) if self.packed else weight_OI

    def __call__(self, x_NI: Tensor, then: Literal["none", "swish"] = "none") -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x_NI, self.weight, None, then, [], "")
        y_NO = F.linear(x_NI, self.weight)
        return y_NO if then == "none" else F.silu(y_NO, inplace=True)

    def combined(self, x_NI: Tensor, other_NO: Tensor, how: Literal["add", "mul"]) -> Tensor:
        """The product plus, or times, `other_NO`."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x_NI, other_NO, self.weight, None, how)
        y_NO = F.linear(x_NI, self.weight)
        return y_NO.add_(other_NO) if how == "add" else y_NO.mul_(other_NO)
