"""All planted bugs."""

from __future__ import annotations

from tests.mutants import (
    in_algorithms,
    in_benchmarks,
    in_chat_and_data,
    in_distributed,
    in_evaluation,
    in_generation,
    in_kernels,
    in_launch,
    in_models,
    in_planning,
    in_ppo,
    in_rewards,
    in_runs_and_stages,
    in_serving,
    in_serving_guard,
    in_settings,
    in_tracking,
)

TABLES = (
    in_algorithms,
    in_kernels,
    in_chat_and_data,
    in_distributed,
    in_launch,
    in_models,
    in_planning,
    in_generation,
    in_evaluation,
    in_ppo,
    in_rewards,
    in_runs_and_stages,
    in_serving,
    in_serving_guard,
    in_settings,
    in_tracking,
    in_benchmarks,
)
BUGS = [bug for table in TABLES for bug in table.BUGS]
