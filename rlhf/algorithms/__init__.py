"""Pure functions on tensors: float32, no state, only torch.

Shapes are in names: B batch, R response length, H hidden size, V vocabulary. Masks are True (or 1) at real tokens;
values in masked slots, NaN included, affect neither results nor gradients. A loss returns its sum and its count, never
a mean: the engine divides once by the count over all ranks and micro-batches.
"""
