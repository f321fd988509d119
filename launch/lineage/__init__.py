"""`rlhf lineage`: the tree of what a model was made from."""
