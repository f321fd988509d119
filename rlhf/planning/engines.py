"""What a model holds on a worker between its passes: weights, gradients, optimizer, buckets.

The constants are those of the code that allocates; tests compare them. Training keeps float32 weights and gradients and
two float32 moments of AdamW: 16 bytes per trained parameter. DeepSpeed's own estimate counts 18 for the same in half
precision with float32 copies (`estimate_zero3_model_states_mem_needs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.config import HardwareConfig, LoraConfig
from rlhf.planning.shapes import ADAPTED, ModelShape

FLOAT, HALF = 4, 2
MOMENTS = 2 * FLOAT
BUCKET_ELEMENTS = 50_000_000  # of gradients: rlhf.distributed.engine
GATHER_BYTES = 256 << 20  # of weights that are copied to the sampler or a file: rlhf.distributed.engine.BUCKET_BYTES
MAX_LIVE = 1_000_000_000  # parameters that DeepSpeed keeps gathered, and elements that it steps at once
PREFETCHED = 50_000_000  # parameters that DeepSpeed gathers ahead
KEPT_WHOLE = 100_000  # DeepSpeed keeps parameters up to this size whole on every worker
ADAPTER_SIZES = {"all-linear": ADAPTED}


@dataclass(frozen=True)
class Part:
    """Bytes of one kind that one role holds."""

    role: str
    kind: str
    bytes: float


@dataclass(frozen=True)
class Layout:
    """How the models of a stage are divided among its workers."""

    workers: int
    zero_stage: int
    offload: bool
    bf16: bool
    cpu: bool
    local: bool = False  # plain torch in one process
    sequence_parallel: int = 1  # workers that share every sequence

    @property
    def groups(self) -> int:
        """Of workers that read rows of their own."""
        return max(self.workers // self.sequence_parallel, 1)

    def slice(self, tokens: int) -> int:
        """Of a micro-batch, the tokens that one worker reads."""
        return -(-tokens // self.sequence_parallel)

    @property
    def sharded(self) -> bool:
        return self.zero_stage == 3 and not self.local

    @property
    def shards(self) -> int:
        return self.workers if self.sharded else 1

    @property
    def gathers(self) -> bool:
        return self.sharded and (self.workers > 1 or self.offload)

    @property
    def number(self) -> int:
        """Bytes of a number in a matrix product."""
        return HALF if self.bf16 else FLOAT


def layout_of(hardware: HardwareConfig, workers: int, local: bool = False) -> Layout:
    offload = hardware.offload_to_cpu and hardware.zero_stage >= 2 and hardware.gpus_per_worker > 0
    bf16, cpu = hardware.precision == "bf16", not hardware.gpus_per_worker
    together = 1 if local else hardware.sequence_parallel
    return Layout(workers, hardware.zero_stage, offload, bf16, cpu, local, together)


@dataclass(frozen=True)
class Model:
    """A model of a stage."""

    role: str
    shape: ModelShape
    scalar: bool = False  # a head of one row instead of the LM head
    learns: bool = False
    lora: LoraConfig | None = None

    @property
    def base(self) -> int:
        """Parameters without an adapter."""
        shape = self.shape
        if not self.scalar:
            return shape.parameters
        return shape.parameters - (0 if shape.tied else shape.table) + shape.hidden

    @property
    def products(self) -> int:
        """Weights of matrix products, which are bf16 where they are frozen in a bf16 run."""
        head = 0 if self.scalar or self.shape.tied else self.shape.table
        return self.shape.backbone_products + head

    @property
    def trained(self) -> int:
        if not self.learns:
            return 0
        if self.lora is None:
            return self.base
        return self.shape.adapter(self.lora) + (self.shape.hidden if self.scalar else 0)

    @property
    def adapted(self) -> bool:
        return self.learns and self.lora is not None

    def frozen_bytes(self, layout: Layout) -> int:
        """Of weights without a gradient."""
        if self.learns and not self.adapted:
            return 0
        kept = self.base - (self.shape.hidden if self.adapted and self.scalar else 0)
        return self.products * layout.number + (kept - self.products) * FLOAT

    def weight_bytes(self, layout: Layout) -> int:
        return self.frozen_bytes(layout) + self.trained * FLOAT

    @property
    def small(self) -> int:
        """Elements of the parameters that DeepSpeed keeps whole: norms, heads, adapters."""
        shape = self.shape
        sizes = [*(out * into for out, into in shape.matrices.values()), *[shape.hidden] * 2] * shape.layers
        sizes += [shape.hidden, shape.table, shape.hidden if self.scalar else 0 if shape.tied else shape.table]
        if self.adapted and self.lora is not None:
            names = ADAPTER_SIZES.get(str(self.lora.targets), self.lora.targets)
            sides = [side for name in names if name in shape.matrices for side in shape.matrices[name]]
            sizes += [self.lora.rank * side for side in sides] * shape.layers
        return sum(size for size in sizes if size <= KEPT_WHOLE)


def resting(model: Model, layout: Layout) -> Iterator[Part]:
    """What a model holds on the device between its passes. Offloaded shards are in main memory (`offloaded`)."""
    T, W = model.trained, layout.workers
    role = model.role
    weights = model.weight_bytes(layout) / layout.shards
    if not (layout.offload and layout.sharded):
        yield Part(role, "weights", weights)
    if layout.gathers:
        yield Part(role, "small weights, whole", model.small * FLOAT)
    if not model.learns:
        return
    if not layout.local and layout.zero_stage:
        yield Part(role, "gradient buckets", BUCKET_ELEMENTS * FLOAT)
    if layout.offload:
        return
    divided = W if layout.zero_stage and not layout.local else 1
    if layout.zero_stage in (1, 2) and not layout.local:
        yield Part(role, "float32 copies", T * FLOAT / W)
    if not layout.local:
        yield Part(role, "gradients", T * FLOAT / (W if layout.zero_stage >= 2 else 1))
    yield Part(role, "optimizer", T * MOMENTS / divided)


def offloaded(model: Model, layout: Layout) -> Iterator[Part]:
    """What one worker's part of an offloaded model holds in main memory: shards, float32 copies, two buffers of
    gradients, moments."""
    if not layout.offload:
        return
    T, W = model.trained, layout.workers
    if layout.sharded:
        yield Part(model.role, "weights", model.weight_bytes(layout) / W)
    if T:
        yield Part(model.role, "float32 copies", T * FLOAT / W)
        yield Part(model.role, "gradients", 2 * T * FLOAT / W)
        yield Part(model.role, "optimizer", T * MOMENTS / W)


def gathered(model: Model, layout: Layout, backward: bool) -> float:
    """Bytes of whole weights during a pass. Without a backward pass nothing is used twice, so only the weight in use and
    those ahead are whole; with one, up to `MAX_LIVE` parameters stay."""
    if not layout.gathers:
        return 0
    each = model.weight_bytes(layout) / (model.base + model.trained * model.adapted)
    large = model.base + model.trained * model.adapted - model.small
    most = MAX_LIVE if backward else model.shape.largest + 2 * PREFETCHED
    return min(large, most) * each
