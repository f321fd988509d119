"""`rlhf promote`: makes a model the champion of its registered model if it is better than the present one.

plan.py           what two policies are compared on: prompts, rewards and sampling of the candidate's run
trained_on.py     leaves out what one of the models has trained on
policies.py       responses of two policies
reward_models.py  scores of two reward models
compared.py       what a comparison tells
command.py        decides, and records the decision
"""
