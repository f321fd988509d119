"""Ranks and shards: collectives, the training engine, micro-batches. DeepSpeed is imported here alone."""
