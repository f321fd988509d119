"""The cost model beside published seconds."""

from __future__ import annotations

from benchmarks import growth


def test_the_settings_are_those_of_the_published_runs() -> None:
    for row in growth.PUBLISHED:
        config = growth.settings_of(row)
        assert (config.hardware.workers, config.ppo.batch_size, config.ppo.epochs) == (row.gpus, 1024, 1)
        assert config.ppo.max_prompt_length == config.ppo.sampling.max_new_tokens == 1024


def test_no_published_run_is_faster_than_planned_and_none_slower_than_four_times() -> None:
    fitting = [(row, seconds) for row in growth.PUBLISHED if (seconds := growth.predicted(row)) is not None]
    assert [row.model for row, _ in fitting] == ["llama-2-7b", "llama-2-13b"]
    for row, seconds in fitting:
        assert seconds < row.openrlhf < row.deepspeed_chat < 4 * seconds


def test_what_does_not_fit_is_said() -> None:
    assert list(growth.rows())[-1][2] == "does not fit"
