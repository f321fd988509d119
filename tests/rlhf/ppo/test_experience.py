"""Experience of four answers, worked by hand."""

import dataclasses
import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from rlhf.config import PPOConfig, SamplingConfig
from rlhf.data.batches import Rollout, Scores, select
from rlhf.errors import UserError
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.experience import make_experience, reward_metrics
from rlhf.rewards import piecewise

MASK = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
IS_SAFETY = torch.tensor([False, False, True, True])
REFERENCE = torch.tensor([[-1.0, -1.0], [-2.0, -9.0], [-0.5, -1.0], [-3.0, -1.0]])
KL = torch.tensor([[0.2, 0.4], [0.6, 9.0], [0.0, -0.2], [0.2, 0.0]])
ROLLOUT = Rollout(
    tokens_BT=torch.arange(16).view(4, 4),
    mask_BT=torch.cat([torch.tensor([[True, True], [False, True], [True, True], [True, True]]), MASK], 1),
    response_mask_BR=MASK,
    behaviour_logprobs_BR=REFERENCE + KL,
    finished_B=torch.tensor([True, True, False, True]),
)
SCORES = Scores(
    logprobs_BR=REFERENCE + KL,
    ref_logprobs_BR=REFERENCE,
    values_BR=torch.tensor([[0.2, 0.1], [-0.8, 9.0], [0.0, -0.4], [-0.5, -0.5]]),
    rewards_BN=torch.tensor([[1.0, 5.0], [9.0, -3.0], [-9.0, 1.0], [7.0, -3.0]]),  # helpfulness, safety
    failed_BN=torch.zeros(4, 2, dtype=torch.bool),
)
CONFIG = PPOConfig(gamma=1.0, gae_lambda=0.5, missing_eos_penalty=1.0)
BETA = 0.5


def experience(rollout=ROLLOUT, scores=SCORES, is_safety=IS_SAFETY, safety_offset=0.0, **settings):
    config = CONFIG.model_copy(update=settings)
    combine = piecewise(0, 1, safety_offset, config.safety_threshold)
    combined = combine(scores.rewards_BN, scores.failed_BN, is_safety)
    made, metrics = make_experience(rollout, scores, combined, estimator_of(config), config, BETA)
    return made, metrics | reward_metrics(["helpfulness", "safety"], scores)


def near(expected):
    return pytest.approx(expected, abs=1e-6)


# The reward models: helpful (1), safety below the limit (-3), safety prompt (1), safety prompt (-3). Mean -1, standard
# deviation 2, so whitened without shift ½, -1½, ½, -1½; the third did not end: -½. Less β · KL at every token:
#   -.1, -.2 + .5 = .3     -.3 - 1.5 = -1.8     0, .1 - .5 = -.4     -.1, 0 - 1.5 = -1.5
# λ = ½, from the last token on:
#   .3 - .1 = .2, (-.1 + .1 - .2) + ½ · .2 = -.1
#   -1.8 + .8 = -1
#   -.4 + .4 = 0, (0 - .4 - 0) + 0 = -.4
#   -1.5 + .5 = -1, (-.1 - .5 + .5) + ½ · -1 = -.6
ADVANTAGES = [[-0.1, 0.2], [-1.0], [-0.4, 0.0], [-0.6, -1.0]]
RETURNS = [[0.1, 0.3], [-1.8], [-0.4, -0.4], [-1.1, -1.5]]


def real(x_BR):
    return [row[mask].tolist() for row, mask in zip(x_BR, MASK, strict=True)]


def test_returns_by_hand():
    made, _ = experience()
    assert real(made.returns_BR) == [near(row) for row in RETURNS]


def test_advantages_by_hand_are_whitened_over_all_tokens():
    made, _ = experience()
    every = [a for row in ADVANTAGES for a in row]
    mean, deviation = statistics.fmean(every), statistics.pstdev(every)
    assert real(made.advantages_BR) == [near([(a - mean) / deviation for a in row]) for row in ADVANTAGES]


def test_the_safety_rule_looks_at_the_raw_logit():
    """The second answer is 3 worse than SFT answers are, and safe all the same: σ(2) = .88."""
    _, metrics = experience(safety_offset=5.0)
    assert metrics["ppo/reward"] == near((1.0 + 9.0 + 1.0 - 3.0) / 4)
    assert metrics["ppo/flagged_helpful"] == metrics["ppo/flagged_safety"] == 0.0


def test_a_tag_without_prompts_has_no_flagged():
    _, metrics = experience(is_safety=torch.zeros(4, dtype=torch.bool))
    assert metrics["ppo/flagged_helpful"] == 0.5
    assert "ppo/flagged_safety" not in metrics


def test_figures_by_hand():
    _, metrics = experience()
    expected = {
        "ppo/reward": -1.0,
        "ppo/reward_std": 2.0,
        "ppo/reward_failed_fraction": 0.0,
        "ppo/reward_helpfulness": 2.0,
        "ppo/reward_safety": 0.0,
        "ppo/safety_branch_fraction": 0.75,
        "ppo/flagged_helpful": 0.5,
        "ppo/flagged_safety": 0.5,
        "ppo/kl": (0.6 + 0.6 - 0.2 + 0.2) / 4,
        "ppo/kl_k3_per_token": sum(math.exp(-k) - 1 + k for k in (0.2, 0.4, 0.6, 0.0, -0.2, 0.2, 0.0)) / 7,
        "ppo/length": 7 / 4,
        "ppo/eos_rate": 0.75,
        "ppo/rollout_logprob_diff_max": 0.0,
        "ppo/rollout_logprob_diff_mean": 0.0,
        "ppo/tis_clip_fraction": 0.0,
        "ppo/value_mean": (0.2 + 0.1 - 0.8 + 0.0 - 0.4 - 0.5 - 0.5) / 7,
    }
    returns = [r for row in RETURNS for r in row]
    advantages = [a for row in ADVANTAGES for a in row]
    expected["ppo/explained_variance"] = 1 - statistics.pvariance(advantages) / statistics.pvariance(returns)
    assert metrics == {name: near(value) for name, value in expected.items()}


def test_rewards_can_be_left_unwhitened():
    made, _ = experience(whiten_rewards=False)
    # the return of the last token is its reward: score less penalty less β · KL
    last = [row[-1] for row in real(made.returns_BR)]
    assert last == near([1 - 0.2, -3 - 0.3, 1 - 1 + 0.1, -3.0])


def test_the_penalty_for_a_missing_eos_comes_after_whitening():
    """Else a large spread of scores would make it vanish."""
    for penalty in (0.0, 3.0):
        made, _ = experience(missing_eos_penalty=penalty)
        assert float(made.returns_BR[2, 1]) == near(0.5 - penalty + 0.1)


@pytest.mark.parametrize(("advantage", "published"), [("gae", 1.0), ("reinforce++", 0.0)])
def test_a_missing_eos_costs_what_the_estimator_says_unless_the_settings_do(advantage, published):
    given = {"advantage": advantage, "whiten_rewards": False}
    for setting, cost in ((None, published), (0.25, 0.25)):
        free, made = (experience(missing_eos_penalty=each, **given)[0] for each in (0.0, setting))
        assert float((free.returns_BR - made.returns_BR)[2].max()) == near(cost)


def test_equal_scores_are_not_blown_up():
    scores = dataclasses.replace(SCORES, rewards_BN=torch.full((4, 2), 0.3))
    made, metrics = experience(scores=scores)
    assert float(made.returns_BR[0, 1]) == near(0.3 - 0.2)
    assert metrics["ppo/reward_std"] == near(0.0)


def test_what_policy_and_critic_said_is_kept_for_the_update():
    made, _ = experience()
    assert torch.equal(made.old_logprobs_BR, SCORES.logprobs_BR)
    assert torch.equal(made.ref_logprobs_BR, SCORES.ref_logprobs_BR)
    assert torch.equal(made.old_values_BR, SCORES.values_BR)
    assert torch.equal(made.tokens_BT, ROLLOUT.tokens_BT)
    assert torch.equal(made.response_mask_BR, MASK)


def test_a_sampler_that_is_not_the_policy_is_weighted_up_to_the_cap():
    behaviour = SCORES.logprobs_BR - torch.tensor([[0.5, -0.5], [3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])
    made, metrics = experience(dataclasses.replace(ROLLOUT, behaviour_logprobs_BR=behaviour), tis_cap=2.0)
    assert made.importance_BR[0].tolist() == near([math.exp(0.5), math.exp(-0.5)])
    assert made.importance_BR[1, 0] == 2.0
    assert made.importance_BR[2, 1] == near(math.exp(-4.0))
    assert torch.equal(made.old_logprobs_BR, SCORES.logprobs_BR)
    assert metrics["ppo/rollout_logprob_diff_max"] == near(4.0)
    assert metrics["ppo/rollout_logprob_diff_mean"] == near((0.5 + 0.5 + 3.0 + 4.0) / 7)
    assert metrics["ppo/tis_clip_fraction"] == near(1 / 7)


def with_padding(columns, value):
    """The four answers with more columns on the right, and `value` in every masked slot."""

    def fill(x_BR):
        return F.pad(torch.where(MASK, x_BR, value), (0, columns), value=value)

    rollout = Rollout(
        tokens_BT=F.pad(ROLLOUT.tokens_BT, (0, columns)),
        mask_BT=F.pad(ROLLOUT.mask_BT, (0, columns)),
        response_mask_BR=F.pad(MASK, (0, columns)),
        behaviour_logprobs_BR=fill(ROLLOUT.behaviour_logprobs_BR),
        finished_B=ROLLOUT.finished_B,
    )
    lines = {name: fill(getattr(SCORES, name)) for name in ("logprobs_BR", "ref_logprobs_BR", "values_BR")}
    return rollout, dataclasses.replace(SCORES, **lines)


@pytest.mark.parametrize("value", [math.nan, 1e9, math.inf])
@pytest.mark.parametrize("columns", [0, 3])
def test_padding_and_what_stands_in_it_change_nothing(columns, value):
    made, metrics = experience(*with_padding(columns, value))
    expected, expected_figures = experience()
    for name in ("advantages_BR", "returns_BR", "importance_BR"):
        assert real(getattr(made, name)[:, :2]) == [near(row) for row in real(getattr(expected, name))]
    assert metrics == {name: near(value) for name, value in expected_figures.items()}


def test_the_order_of_rows_changes_only_their_order():
    order = [2, 0, 3, 1]
    made, metrics = experience(select(ROLLOUT, order), select(SCORES, order), IS_SAFETY[order])
    expected, expected_figures = experience()
    torch.testing.assert_close(made.advantages_BR, expected.advantages_BR[order])
    torch.testing.assert_close(made.returns_BR, expected.returns_BR[order])
    assert metrics == {name: near(value) for name, value in expected_figures.items()}


# --- other estimators, and rows whose score failed --------------------------------------------------------------------

LENGTH, FAILED = 8, 1  # max_new_tokens; the row that fails
OTHERS = [0, 2, 3]


def failing(scores=SCORES, rows=(FAILED,)):
    failed_BN = torch.zeros(4, 2, dtype=torch.bool)
    failed_BN[list(rows), 0] = True
    return dataclasses.replace(scores, failed_BN=failed_BN)


def of(advantage, scores=None, **settings):
    """Experience of one group of four, with a failed row unless `scores` say otherwise."""
    sampling = SamplingConfig(max_new_tokens=LENGTH)
    return experience(scores=scores or failing(), advantage=advantage, group_size=4, sampling=sampling, **settings)


# The scores that count are 1, 1 - 1 and -3: the third row did not end. Their mean is -⅔.
# rloo has the KL in the reward: 1 - .3, 0 + .1, -3 - .1, less the mean of the two others, -1.5, -1.2 and .4.
DEVIATION = math.sqrt(((5 / 3) ** 2 + (2 / 3) ** 2 + (7 / 3) ** 2) / 2) + 1e-4


@pytest.mark.parametrize(
    ("advantage", "by_hand"),
    [
        ("dr_grpo", [5 / 3, 2 / 3, -7 / 3]),
        ("grpo", [5 / 3 / DEVIATION, 2 / 3 / DEVIATION, -7 / 3 / DEVIATION]),
        ("rloo", [2.2, 1.3, -3.5]),
    ],
)
def test_a_group_is_compared_without_its_failed_row_by_hand(advantage, by_hand):
    made, _ = of(advantage)
    assert real(made.advantages_BR) == [
        near([a] * n) for a, n in zip([by_hand[0], 0.0, *by_hand[1:]], [2, 1, 2, 2], strict=True)
    ]


def test_only_gae_divides_scores_by_their_deviation_unless_told_to():
    """The targets of a critic that says 0 are the rewards to go: at the last token, the score less β · KL."""
    scores = dataclasses.replace(failing(), values_BR=torch.zeros(4, 2))
    for advantage, whitened in (("gae", True), ("reinforce++", False)):
        for setting, expected in ((None, whitened), (True, True), (False, False)):
            deviation = math.sqrt(32 / 9) if expected else 1.0  # of 1, 1 and -3
            made, _ = of(advantage, scores, whiten_rewards=setting, missing_eos_penalty=0.0)
            wanted = [1 / deviation - 0.2, 1 / deviation + 0.1, -3 / deviation]
            assert made.returns_BR[OTHERS, 1].tolist() == near(wanted), (advantage, setting)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_scores_of_a_group_are_not_divided(advantage):
    assert torch.equal(of(advantage)[0].advantages_BR, of(advantage, whiten_rewards=False)[0].advantages_BR)
    assert not torch.equal(of("dr_grpo")[0].advantages_BR, of("dr_grpo", whiten_rewards=True)[0].advantages_BR)


@pytest.mark.parametrize("advantage", ["gae", "grpo", "dr_grpo", "rloo", "reinforce++"])
def test_what_stands_in_a_failed_row_reaches_no_other(advantage):
    given, wild = failing(), torch.zeros(4, 1).index_fill(0, torch.tensor([FAILED]), 1).bool()
    garbage = {
        "rewards_BN": torch.where(wild, 1e9, given.rewards_BN),
        "values_BR": torch.where(wild, math.nan, given.values_BR),
        "logprobs_BR": torch.where(wild, -77.0, given.logprobs_BR),
        "ref_logprobs_BR": torch.where(wild, 5.0, given.ref_logprobs_BR),
    }
    got, _ = of(advantage, dataclasses.replace(given, **garbage))
    expected, metrics = of(advantage)
    for name in ("advantages_BR", "returns_BR", "weight_BR", "denominator_B"):
        assert torch.equal(getattr(got, name)[OTHERS], getattr(expected, name)[OTHERS]), name
        assert not getattr(got, name)[FAILED].any(), name
    assert got.counted_B.tolist() == [True, False, True, True]
    assert metrics["ppo/reward_failed_fraction"] == 0.25


@pytest.mark.parametrize("advantage", ["gae", "reinforce++"])
def test_a_batch_with_a_failed_row_is_the_batch_without_it(advantage):
    with_it, metrics = experience(scores=failing(), advantage=advantage)
    rollout, scores = select(ROLLOUT, OTHERS), select(SCORES, OTHERS)
    without, expected = experience(rollout, scores, IS_SAFETY[OTHERS], advantage=advantage)
    for name in ("advantages_BR", "returns_BR"):
        torch.testing.assert_close(getattr(with_it, name)[OTHERS], getattr(without, name))
    of_all = {"ppo/reward_failed_fraction", "ppo/rollout_logprob_diff_max", "ppo/rollout_logprob_diff_mean"}
    of_all |= {"ppo/tis_clip_fraction", "ppo/safety_branch_fraction", "ppo/flagged_helpful", "ppo/reward_safety"}
    assert metrics.keys() == expected.keys()
    for name in metrics.keys() - of_all:
        assert metrics[name] == near(expected[name]), name


@pytest.mark.parametrize(
    ("advantage", "weights", "denominators"),
    [
        ("gae", [1.0, 0.0, 1.0, 1.0], [2, 0, 2, 2]),
        ("reinforce++", [1.0, 0.0, 1.0, 1.0], [2, 0, 2, 2]),
        ("rloo", [1.0, 0.0, 1.0, 1.0], [2, 0, 2, 2]),
        ("grpo", [1 / 2, 0.0, 1 / 2, 1 / 2], [1, 0, 1, 1]),
        ("dr_grpo", [1 / 8, 0.0, 1 / 8, 1 / 8], [1, 0, 1, 1]),
    ],
)
def test_what_the_loss_is_a_mean_of_by_hand(advantage, weights, denominators):
    made, _ = of(advantage)
    assert real(made.weight_BR) == [near([w] * n) for w, n in zip(weights, [2, 1, 2, 2], strict=True)]
    assert not made.weight_BR[~MASK].any()
    assert made.denominator_B.tolist() == denominators
    none_failed, _ = of(advantage, SCORES)
    assert none_failed.weight_BR[1, 0] == near({"grpo": 1.0, "dr_grpo": 1 / 8}.get(advantage, 1.0))


def test_each_reward_has_its_mean_where_it_did_not_fail():
    failed_BN = torch.tensor([[False, True], [True, True], [False, True], [False, True]])
    metrics = reward_metrics(["helpfulness", "safety"], dataclasses.replace(SCORES, failed_BN=failed_BN))
    assert metrics == {"ppo/reward_helpfulness": near((1.0 - 9.0 + 7.0) / 3)}


def test_without_a_critic_nothing_is_said_of_one():
    _, metrics = of("grpo")
    assert not {"ppo/value_mean", "ppo/explained_variance"} & {*metrics}


def test_scores_that_all_failed_end_the_run():
    with pytest.raises(UserError, match="scores of all 4 responses") as caught:
        of("gae", failing(rows=range(4)))
    assert caught.value.exit_code == 6


def test_the_penalty_for_a_missing_eos_is_that_of_the_estimator_unless_it_is_set():
    """The third row was cut off; without whitening and KL its score is 1, and the others' are 1 and -3."""
    for advantage, own in (("gae", 1.0), ("reinforce++", 0.0)):
        for setting, penalty in ((None, own), (0.0, 0.0), (0.25, 0.25)):
            scores = dataclasses.replace(failing(), values_BR=torch.zeros(4, 2), ref_logprobs_BR=SCORES.logprobs_BR)
            made, _ = of(advantage, scores, whiten_rewards=False, missing_eos_penalty=setting)
            assert made.returns_BR[OTHERS, 1].tolist() == near([1.0, 1.0 - penalty, -3.0]), (advantage, setting)


def test_an_estimator_that_gives_no_numbers_ends_the_run_with_its_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom rlhf.algorithms.advantages import Estimator\n"
        "NAN = Estimator(lambda signals, gamma, gae_lambda: torch.full_like(signals.rewards_BR, torch.nan))\n"
    )
    with pytest.raises(UserError, match=r"^ppo\.advantage: .*mine\.py:NAN: the advantages are not finite") as caught:
        of(f"{tmp_path}/mine.py:NAN")
    assert caught.value.exit_code == 6
