"""`rlhf promote`: makes a policy the champion of its registered model if it is better than the present one.

plan.py     what is compared on what: prompts, rewards and sampling of the candidate's run
command.py  evaluates both, decides, and records the decision
"""
