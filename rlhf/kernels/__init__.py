"""Faster attention, norms, logprobs and linear layers.

Importing this package changes no other library; `enable_kernels` does, and returns what it changed.
"""

from __future__ import annotations


def enable_kernels() -> list[str]:
    """Switches the faster attention on for all transformers models in this process. Returns a line for each change.

    Stages call it; a notebook may. A second call changes nothing.
    """
    import torch
    from transformers.modeling_utils import AttentionInterface

    from rlhf.kernels.attention import attend

    AttentionInterface.register("sdpa", attend)
    # On Hopper torch prefers cuDNN's attention in bf16, which plans every new shape anew, and the lengths of responses
    # always differ: on an H100 passes over new lengths took twice as long, and sampling 2.5 times.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return [
        "transformers: attention 'sdpa' is faster in bf16, on a CPU and for packed rows on a GPU; elsewhere as before",
        "torch: cuDNN's attention is off (torch.backends.cuda.enable_cudnn_sdp)",
    ]
