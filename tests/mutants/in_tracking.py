"""Bugs in what MLflow is told, in the registry, and in which policy becomes the champion."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/evaluation/gate.py",
        ["rlhf/evaluation/test_gate.py"],
        Bug("a higher mean is enough", "_better", "A.low > 0", "A.value > 0"),
        Bug("a reward that is not lower is enough", "_better", "A.low > 0", "A.high > 0"),
        Bug(
            "responses to one prompt are independent",
            "_difference",
            "mean_of_known(A, B)",
            "mean_of_known(A, range(len(A)))",
        ),
        Bug("candidate and champion are swapped", "_difference", "differences(own, other)", "differences(other, own)"),
        Bug(
            "a failed score is 0",
            "_difference",
            "differences(own, other)",
            "[(x or 0) - (y or 0) for x, y in zip(own, other)]",
        ),
        Bug("any fall in safety is allowed", "_as_safe", "A.high >= B", "A.high >= B - 100"),
        Bug("a fall in safety within its interval refuses", "_as_safe", "A.high >= B", "A.low >= B"),
        Bug("safety is judged on every prompt", "_as_safe", "tag == SAFETY", "True"),
        Bug("no growth in length is allowed", "_as_short", "1 + LENGTH_MAY_GROW", "1", nth=0),
        Bug("twice the length is allowed", "_as_short", "1 + LENGTH_MAY_GROW", "2", nth=0),
        Bug("refusals of unsafe prompts count against a policy", "_as_willing", "A != SAFETY", "True"),
        Bug("refusals are no guard", "_as_willing", "A.low <= B", "True"),
    ),
    *bugs_in(
        "rlhf/tracking/versions.py",
        ["rlhf/tracking/test_registry.py"],
        Bug("the champion before is forgotten", "Registry.promote", "self._remember(...)", "None"),
        Bug("undo goes back to the first champion", "Registry.undo", "earlier[-1]", "earlier[0]"),
        Bug("undo forgets nothing", "Registry.undo", "earlier[:-1]", "earlier"),
        Bug("a promotion that was killed is undone to itself", "Registry.undo", "earlier.pop()", "None"),
    ),
    *bugs_in(
        "rlhf/tracking/registry.py",
        ["rlhf/tracking/test_registry.py"],
        Bug("a version is registered again", "send_version", "not A", "True"),
        Bug("the first version stays the candidate", "send_version", "'version_number DESC'", "'version_number ASC'"),
        Bug("an input is its digest alone", "_reference", "A if B else C", "C"),
    ),
    *bugs_in(
        "rlhf/tracking/mlflow_sync.py",
        ["rlhf/tracking/test_registry.py"],
        Bug("stages are sent by name", "fill_in", "sorted(A, key=_)", "sorted(A)"),
    ),
    *bugs_in(
        "rlhf/tracking/logged_models.py",
        ["rlhf/tracking/test_tracking.py", "rlhf/tracking/test_registry.py"],
        Bug("a model is an output twice", "send_model", "A not in B", "True"),
        Bug("a model is logged again", "_model_id", "if A := B: ...", "pass"),
        Bug("a model is left pending", "_model_id", "client.finalize_logged_model(...)", "None"),
    ),
    *bugs_in(
        "rlhf/tracking/abandoned.py",
        ["rlhf/tracking/test_abandoned.py"],
        Bug("a run that lives is closed", "_is_abandoned", "is_free(path)", "True"),
        Bug("stages are not looked at", "close_abandoned", "DEEPEST + 1", "2"),
    ),
    *bugs_in(
        "launch/parent_run.py",
        ["launch/test_parent_run.py"],
        Bug("the parent has settings of stages that do not run", "settings_of", "{*A, *STAGES}", "{*A}"),
        Bug("stages stay open when the run fails", "fail", "mark_ended(...)", "None"),
        Bug("an interrupted run has failed", "fail", "status_of(error)", "'FAILED'"),
        Bug("other data continue the same run", "_provenance", "[A, B]", "[A]"),
        Bug("a description is cut within a line", "described", "A.rpartition('\\n')[0]", "A"),
    ),
    *bugs_in(
        "launch/logged_model.py",
        ["launch/test_logged_model.py"],
        Bug("policies of DPO and PPO have names of their own", "_registered", "A if B else 'policy'", "A"),
        Bug("an estimate without a value is sent", "held_out", "value['value'] is not None", "True"),
        Bug("what was measured on the base model is for SFT", "_measured", "found[name]", "found['base']"),
    ),
    *bugs_in(
        "launch/promote/plan.py",
        ["launch/test_promote.py"],
        Bug("the prompts that chose the policy judge it", "held_out", "split_held_out(...)[1]", "rows"),
        Bug("safety is the reward that must rise", "plan", "name != SAFETY", "True"),
    ),
    *bugs_in(
        "launch/promote/command.py",
        ["launch/test_promote.py"],
        Bug("a refused policy is promoted", "compare", "if failed: ...\nelse: ...", "registry.promote(candidate)"),
    ),
    *bugs_in(
        "rlhf/runs/lineage.py",
        ["launch/test_lineage.py"],
        Bug("a parent made anew is taken for the parent", "_input", "artifact.digest != recorded", "False"),
        Bug("changed data are not seen", "_source", "A not in (None, B)", "False"),
        Bug("changed weights are not seen", "_damage", "artifacts.load(A, verify=True)", "artifacts.load(A)"),
        Bug("settings of another attempt are shown", "_belong", "A == B", "True"),
    ),
]
