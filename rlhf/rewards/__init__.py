"""Rewards score responses. A reward is a callable: `reward(responses) -> Scored`.

base.py      the protocol               model.py    a reward model
function.py  a Python function          combine.py  one score from several rewards
"""

from rlhf.rewards.base import Responses, Reward, Scored, is_reward, responses_of, text_responses
from rlhf.rewards.combine import Combine, Combined, RewardSet, piecewise, weighted_sum
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.model import ModelReward

__all__ = [
    "Combine",
    "Combined",
    "FunctionReward",
    "ModelReward",
    "Responses",
    "Reward",
    "RewardSet",
    "Scored",
    "is_reward",
    "piecewise",
    "responses_of",
    "text_responses",
    "weighted_sum",
]
