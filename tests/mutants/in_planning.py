"""Bugs in the plan of a run: rlhf/planning, launch/plan."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/planning/shapes.py",
        ["rlhf/planning/test_arithmetic.py"],
        Bug("a tied table counts twice", "ModelShape.parameters", "1 if self.tied else 2", "2"),
        Bug("all heads have keys of their own", "from_config", "config.get('num_key_value_heads') or A", "A"),
        Bug("an adapter has one side", "ModelShape.adapter", "sum(self.matrices[A])", "min(self.matrices[A])"),
    ),
    *bugs_in(
        "rlhf/planning/engines.py",
        ["rlhf/planning/test_arithmetic.py"],
        Bug("the optimizer is not divided", "resting", "T * MOMENTS / A", "T * MOMENTS"),
        Bug(
            "frozen weights are float32", "Model.frozen_bytes", "self.products * layout.number", "self.products * FLOAT"
        ),
    ),
    *bugs_in(
        "rlhf/planning/engines.py",
        ["launch/test_plan.py"],
        Bug("every worker holds whole sequences", "Layout.slice", "-(-A // B)", "A"),
    ),
    *bugs_in(
        "rlhf/planning/disk.py",
        ["rlhf/planning/test_disk.py", "launch/test_preflight_model.py"],
        Bug(
            "an artifact replaces the one before", "disk_bytes", "A += B * C * WEIGHT_BYTES", "A = B * C * WEIGHT_BYTES"
        ),
        Bug("the last stage is the peak", "disk_bytes", "max(A, B + C * D)", "B + C * D"),
        Bug("reward models are trained one by one", "disk_bytes", "min(A, max(...))", "1"),
        Bug("all reward models are trained at once", "disk_bytes", "min(A, max(...))", "A"),
        Bug("there is always a critic", "_models", "2 if A else 1", "2"),
        Bug("the critic has no artifact", "_models", "2 if A else 1", "1"),
        Bug("all checkpoints of a stage stay", "_checkpoints", "min(CHECKPOINTS, A)", "A", nth=0),
        Bug("all checkpoints of PPO stay", "_checkpoints", "min(CHECKPOINTS, A // B)", "A // B"),
        Bug("checkpoints of an adapter are whole", "_checkpoints", "A.adapter(B) if A else 0", "parameters"),
        Bug("the best policy is nowhere", "_checkpoints", "BEST_MODELS * A * WEIGHT_BYTES", "0"),
    ),
    *bugs_in(
        "rlhf/planning/plan.py",
        ["launch/test_plan.py", "launch/test_preflight.py"],
        Bug("a host is never too small", "RunPlan._of", "A > self.machine.host_memory", "False"),
    ),
    *bugs_in(
        "rlhf/planning/cost.py",
        ["launch/test_plan.py"],
        Bug("one GPU is paid", "Cost.dollars", "A * self.gpus * B", "A * B"),
    ),
    *bugs_in(
        "rlhf/planning/sampler.py",
        ["launch/test_plan.py", "rlhf/planning/test_arithmetic.py"],
        Bug("each worker holds the whole sampler", "Sampler.weights", "A * B / self.workers", "A * B"),
        Bug("a sampler that sleeps stays on the device", "Sampler.resting", "[] if A else B", "B"),
        Bug("a sampler elsewhere is on the worker's device", "Sampler.resting", "A or self.elsewhere", "A"),
        Bug("it sleeps nowhere", "Sampler.asleep", "A if B else []", "[]"),
        Bug("heads of keys are divided without end", "Sampler.cache", "min(self.workers, A)", "self.workers"),
    ),
    *bugs_in(
        "rlhf/planning/change.py",
        ["launch/test_plan.py"],
        Bug("samplers are never divided", "_shared_samplers", "k > A", "False"),
    ),
    *bugs_in(
        "launch/plan/command.py",
        ["launch/test_plan.py"],
        Bug("what does not fit ends with 0", "run", "return 0 if A else CANNOT", "return 0"),
        Bug("reward models get all workers", "_workers", "A * B // C", "A"),
    ),
]
