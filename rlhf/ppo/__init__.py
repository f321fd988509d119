"""PPO: sample, score, make experience, update."""
