"""The true quality of an answer in the shipped world."""

from reward_data.world.quality import gold_score

__all__ = ["gold_score"]
