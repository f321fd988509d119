"""PPO: sample, score, make experience, update. Start reading at `PPOTrainer.step` in trainer.py."""
