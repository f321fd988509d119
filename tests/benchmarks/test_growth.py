"""The cost model beside published seconds."""

from __future__ import annotations

from benchmarks import growth


def test_the_settings_are_those_of_the_published_runs() -> None:
    for row in growth.PUBLISHED:
        config = growth.settings_of(row)
        assert (config.hardware.workers, config.ppo.batch_size, config.ppo.epochs) == (row.gpus, 1024, 1)
        assert config.ppo.max_prompt_length == config.ppo.sampling.max_new_tokens == 1024


def test_published_runs_take_as_long_as_planned_or_up_to_six_times() -> None:
    for row in growth.PUBLISHED:
        seconds = growth.predicted(row)
        assert seconds is not None, "it fits, as it did there"
        assert 0.9 * seconds < row.openrlhf < row.deepspeed_chat < 6 * seconds
