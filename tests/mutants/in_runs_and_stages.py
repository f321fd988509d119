"""Bugs in what a run keeps and how a stage begins: rlhf/runs, stages."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/runs/checkpoint.py",
        ["rlhf/runs/test_checkpoint.py"],
        Bug("β is lost on resume", "save", "A | B", "{key: A[key] for key in A if key != 'beta'} | B"),
        Bug("the oldest checkpoint is taken", "newest.choose", "A[_]", "A[0]"),
        Bug("engines are not loaded", "restore", "_.load(_)", ""),
    ),
    *bugs_in(
        "stages/ppo.py",
        ["stages/test_ppo.py::test_the_critic_starts_from_zero", "stages/test_ppo.py::test_lora_adapts_the_critic_too"],
        Bug("the critic starts as the raw reward model", "open_models", "new_critic(A)", "A"),
        Bug(
            "the critic is trained in full beside a policy with LoRA",
            "open_models",
            "_ = add_lora(_, _, 'scalar', _)",
            "",
        ),
    ),
    *bugs_in(
        "stages/ppo.py",
        ["stages/test_ahead.py"],
        Bug(
            "answers sampled ahead are lost on resume",
            "_parts",
            "{'policy': A, 'critic': B, 'ahead': _}",
            "{'policy': A, 'critic': B}",
        ),
    ),
    *bugs_in(
        "stages/sft.py",
        ["stages/test_sft.py::test_a_model_whose_packed_rows_see_one_another_is_refused_before_the_first_step"],
        Bug("SFT packs what cannot be packed", "PackingCheck.on_train_begin", "check_packing(_, 'sft.packing')", ""),
        Bug(
            "PPO asks after two stages what can be packed",
            "PackingCheck.on_train_begin",
            "check_packing(A, 'ppo.packing', B)",
            "(A, 'ppo.packing', B)",
        ),
    ),
]
