"""Pure functions on tensors: float32, no state, torch alone.

Shapes stand in names: B batch, R response length, H hidden size, V vocabulary. Masks are True (or 1) at real tokens;
what lies in masked slots, NaN included, reaches neither a result nor a gradient. A loss returns its sum and its count,
never a mean: the engine divides once by the count over all ranks and micro-batches.
"""
