"""Bugs in what a run keeps and how a stage begins: rlhf/runs, stages."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/runs/checkpoint.py",
        ["rlhf/runs/test_checkpoint.py"],
        Bug("β is lost on resume", "save", "A | B", "{key: A[key] for key in A if key != 'beta'} | B"),
        Bug("the oldest checkpoint is taken", "newest.choose", "found[::-1]", "found"),
        Bug("a damaged checkpoint is used", "newest", "if not faults: return A", "return A"),
        Bug(
            "only sizes of a checkpoint are compared",
            "_damage",
            "damage(A, B, verify=True)",
            "damage(A, B, verify=False)",
        ),
        Bug("an edited state is used", "_damage", "if not intact: return _", ""),
        Bug("a stage begins anew where all checkpoints are damaged", "newest", "if candidates: raise A", ""),
        Bug("engines are not loaded", "restore", "_.load(_)", ""),
    ),
    *bugs_in(
        "rlhf/ppo/models.py",
        ["stages/test_ppo.py::test_the_critic_starts_from_zero", "stages/test_ppo.py::test_lora_adapts_the_critic_too"],
        Bug("the critic starts as the raw reward model", "_critic", "new_critic(A)", "A"),
        Bug("the critic is trained in full beside a policy with LoRA", "open_models", "A and _trained(A, ...)", "A"),
    ),
    *bugs_in(
        "rlhf/ppo/trainer.py",
        ["stages/test_off_policy.py"],
        Bug("prefetched responses are lost on resume", "PPOTrainer._parts", "{**A, 'prefetched': _}", "{**A}"),
    ),
    *bugs_in(
        "stages/base.py",
        ["launch/test_settings.py"],
        Bug(
            "a stage may stand before the one it starts from",
            "misfits",
            "A not in before",
            "A not in config.pipeline",
        ),
        Bug("a stage may come twice", "misfits", "name in before", "False"),
        Bug("missing data is found when its stage runs", "misfits", "getattr(config.data, A) is None", "False"),
    ),
    *bugs_in(
        "launch/pipeline.py",
        ["launch/test_pipeline.py"],
        Bug("every stage runs, whatever the pipeline", "run_stage", "{*chosen} <= {*_}", "True"),
    ),
    *bugs_in(
        "launch/implicit_reward.py",
        ["stages/test_dpo.py::test_the_policy_scores_pairs_by_how_far_it_has_moved"],
        Bug("prompts count as responses", "ImplicitReward.score", "A & (B >= _)", "A"),
        Bug("the reference is the policy of any run", "load_implicit_reward", "A.digest != B", "False"),
        Bug("a response is read one token late", "_logprobs", "A[:, :-1]", "A[:, 1:]"),
        Bug("beta is left out", "ImplicitReward.score", "self.beta * A", "A"),
    ),
    *bugs_in(
        "stages/dpo.py",
        [
            "stages/test_dpo.py::test_loss_and_gradient_are_those_of_the_equation",
            "stages/test_dpo.py::test_held_out_figures_are_what_plain_transformers_measures",
        ],
        Bug(
            "beta is TRL's",
            "open_trainer",
            "TRLConfig(..., beta=_)",
            "TRLConfig(...)",
        ),
        Bug(
            "held-out prompts count as responses",
            "HeldOut._logprobs",
            "A & (B >= _)",
            "A",
            harmless="the prompt is the same in both responses of a pair, so it cancels in their difference",
        ),
        Bug(
            "texts come back in the order of their length",
            "HeldOut._logprobs",
            "[A[B] for B in range(_)]",
            "list(A.values())",
        ),
        Bug(
            "the held-out reference has the adapter",
            "HeldOut.rewards",
            "model.disable_adapter()",
            "contextlib.nullcontext()",
        ),
        Bug("the held-out loss is without beta", "HeldOut.rewards", "self.config.dpo.beta * A", "A"),
        Bug(
            "the reference starts from the base model",
            "open_trainer",
            "frozen(load_causal(sft, ...), A)",
            "frozen(load_causal(sft.parents[1] / 'base', ...), A)",
        ),
        Bug("chosen and rejected are swapped", "_encode", "(row.chosen, row.rejected)", "(row.rejected, row.chosen)"),
    ),
    *bugs_in(
        "stages/dpo.py",
        [
            "stages/test_dpo.py::test_lora_is_saved_merged_and_as_one_adapter",
            "stages/test_dpo.py::test_pairs_over_the_length_are_left_out_and_none_is_cut",
        ],
        Bug("TRL's copy of the adapter is saved too", "open_trainer", "model.delete_adapter('ref')", ""),
        Bug("pairs over the length are kept", "encode_pairs", "pair.length <= max_length", "True"),
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
