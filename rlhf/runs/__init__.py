"""Runs: artifacts, where they come from, checkpoints, progress."""
