"""Ranks and shards: collectives, the training engine, micro-batches. The only package that imports DeepSpeed."""
