"""A small world of tasks with a computable right answer: its prompts, its answers, their true quality.

words (what can be said) <- tasks (what is asked) <- answers (how it is answered) <- quality (how good that is),
generate (the shipped files). CARD.md in the folder above describes it.
"""
