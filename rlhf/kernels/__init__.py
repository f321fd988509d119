"""Faster forms of what models compute: attention, norms, logprobs, linear layers.

Importing changes no other library. `enable_kernels` does, and says what it changed.
"""

from __future__ import annotations


def enable_kernels() -> list[str]:
    """Switches the faster attention on for every model of transformers in this process. Returns what it changed, a line each.

    A second call changes nothing more. Stages call it; a notebook may.
    """
    import torch
    from transformers.modeling_utils import AttentionInterface

    from rlhf.kernels.attention import attend

    AttentionInterface.register("sdpa", attend)
    # On Hopper torch prefers cuDNN's attention in bf16, which makes a plan for every new shape, and responses are of ever
    # other lengths: on an H100 a pass over new lengths took twice as long, sampling two and a half times.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return [
        "transformers: attention 'sdpa' is faster in bf16, on a CPU and for packed rows on a GPU; elsewhere as before",
        "torch: cuDNN's attention is off (torch.backends.cuda.enable_cudnn_sdp)",
    ]
