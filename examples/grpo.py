"""GRPO on a model's folder with a function as reward, in one process and without a settings file.

python examples/grpo.py path/to/model out
"""

from __future__ import annotations

import sys

from rlhf import PPOConfig, PPOTrainer, load_policy

PROMPTS = [
    "What is the capital of France?",
    "What is the opposite of hot?",
    "Name a fruit.",
    "How many legs does a spider have?",
]


def short(responses: list[str]) -> list[float]:
    """Fewer characters are better."""
    return [-len(response) / 100 for response in responses]


def main(model: str, out: str, iterations: int = 20) -> None:
    config = PPOConfig(
        advantage="grpo",
        group_size=4,
        iterations=iterations,
        batch_size=16,
        minibatch_size=16,
        sampling={"max_new_tokens": 32},  # type: ignore[arg-type]
        optim={"lr": 1e-4},  # type: ignore[arg-type]
    )
    trainer = PPOTrainer(model, rewards={"short": short}, prompts=PROMPTS, config=config)
    trainer.train()
    trainer.save(out)
    for prompt, response in zip(PROMPTS, load_policy(out).generate(PROMPTS, max_new_tokens=32), strict=True):
        print(f"{prompt}\n  {response}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
