"""Faster forms of what models compute: attention, norms, logprobs, linear layers."""
