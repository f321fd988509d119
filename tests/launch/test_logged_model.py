"""Which figures of an artifact MLflow has for its model."""

from launch.logged_model import held_out


def estimate(value: float | None) -> dict:
    return {"value": value, "low": 0, "high": 1, "n": 9}


def test_estimates_are_taken_with_their_groups_and_counts_are_not() -> None:
    metrics = {
        "accuracy": estimate(0.7),
        "by_tag": {"safety": estimate(0.6)},
        "reward.helpfulness": estimate(0.5),
        "calibration": [{"observed": estimate(0.4)}],
        "ties": estimate(None),
        "held_out_loss": 2.0,
        "steps": 3,
    }
    assert dict(held_out(metrics)) == {
        "held_out/accuracy": 0.7,
        "held_out/by_tag_safety": 0.6,
        "held_out/reward_helpfulness": 0.5,
        "held_out/loss": 2.0,
    }
