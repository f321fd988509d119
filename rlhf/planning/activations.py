"""What a micro-batch of M tokens holds on the device.

The hidden states between layers are float32, because embeddings are; matrix products read and write bf16 in a bf16 run.
Per token of a layer, b bytes a number, H hidden, Q and K widths of queries and keys, I width of the MLP:

    kept for the backward pass    two inputs of norms, two results, queries, keys, values, the result of attention
                                  twice, and gate, its activation, up and their product
    without a backward pass       one hidden state, a result, and the larger of attention's and the MLP's
"""

from __future__ import annotations

from rlhf.planning.engines import FLOAT, Layout
from rlhf.planning.shapes import ModelShape

CHUNK = 512  # positions whose logits exist at a time: rlhf.kernels.logprobs
LOGIT_BLOCK = {True: 8 << 20, False: 256 << 20}  # bytes of them that are float32, on a CPU and on a GPU
PREFILL_TOKENS = 2048  # prompt tokens that the sampler reads at a time: rlhf.generation.in_process


def kept_by_layer(shape: ModelShape, layout: Layout) -> int:
    """Bytes per token that a layer keeps for its backward pass."""
    H, Q, K, I, b = shape.hidden, shape.query, shape.kv, shape.inner, layout.number
    normed = 2 * H * (b if layout.bf16 else 2 * FLOAT)  # float32 norms also keep what they scale
    return 2 * H * FLOAT + normed + (Q + 2 * K) * b + 2 * Q * b + 4 * I * b


def passing_layer(shape: ModelShape, layout: Layout) -> int:
    """Bytes per token at the worst moment of a layer in a pass without gradient."""
    H, Q, K, I, b = shape.hidden, shape.query, shape.kv, shape.inner, layout.number
    attention = 2 * (Q + K) * FLOAT + (2 * Q + 2 * K) * b  # rotary positions are float32
    return 2 * H * FLOAT + H * b + max(attention, 3 * I * b)


def training(shape: ModelShape, layout: Layout, tokens: int, recompute: bool) -> float:
    """At the start of the backward pass of the last layer: what all layers keep, or with recomputation their inputs and
    what one keeps; and the gradients inside that layer."""
    H, I, b = shape.hidden, shape.inner, layout.number
    layer = kept_by_layer(shape, layout)
    kept = shape.layers * H * FLOAT + layer if recompute else shape.layers * layer
    gradients = 2 * H * FLOAT + 2 * I * b
    return tokens * (kept + gradients + 2 * H * FLOAT)


def passing(shape: ModelShape, layout: Layout, tokens: int) -> float:
    return tokens * (passing_layer(shape, layout) + 2 * shape.hidden * FLOAT)


def logits(shape: ModelShape, layout: Layout, predicted: int, backward: bool) -> float:
    """Logits of one chunk, and float32 copies of a block; in a backward pass the head in the precision of products."""
    rows = min(CHUNK, predicted)
    block = min(LOGIT_BLOCK[layout.cpu], rows * shape.vocab * FLOAT)
    whole = rows * shape.vocab * layout.number * (2 if backward else 1)
    cast = shape.table * layout.number if layout.bf16 else 0
    copies = 1 + layout.bf16 + backward  # the softmax, a float32 copy, and what entropies or gradients need
    return whole + copies * block + cast


def sampling(shape: ModelShape, layout: Layout, rows: int, prompt: int, columns: int) -> tuple[float, float]:
    """(activations, logits): reading prompts and drawing tokens of `rows` rows."""
    tokens, b = min(max(PREFILL_TOKENS // prompt, 1), rows) * prompt, layout.number
    activations = tokens * b * (4 * shape.hidden + 3 * (shape.query + 2 * shape.kv) + 2 * shape.inner)
    scores = rows * shape.heads * columns * b * (3 if layout.cpu else 1)
    return max(activations, scores), rows * shape.vocab * (b + 3 * FLOAT)


def casts(shape: ModelShape, layout: Layout, products: int, recompute: bool) -> float:
    """Trained weights are cast to bf16 for each product. The backward pass needs the casts again: without recomputation
    it keeps those of all layers."""
    if not layout.bf16:
        return 0.0
    return products * layout.number / (shape.layers if recompute else 1)
