"""What a run needs of memory and time, by arithmetic: nothing is loaded, and no library either.

shapes.py       the sizes of a model
machines.py     the sizes and rates of a machine
engines.py      what a model holds in training, and frozen
activations.py  what a micro-batch holds
phases.py       what a worker and a host hold in each phase of PPO
supervised.py   the same of SFT, reward models and DPO
plan.py         all of it for a run, and whether it fits
change.py       the nearest change of settings that fits
cost.py         seconds of an iteration
disk.py         what lies in the run's folder
"""

from rlhf.planning.change import Change, nearest_change
from rlhf.planning.cost import Cost, cost_of
from rlhf.planning.disk import disk_bytes
from rlhf.planning.machines import Machine, machine_named, machines
from rlhf.planning.plan import Phase, RunPlan, StagePlan, plan_run
from rlhf.planning.shapes import ModelShape, parameters_of, shape_of

__all__ = [
    "Change",
    "Cost",
    "Machine",
    "ModelShape",
    "Phase",
    "RunPlan",
    "StagePlan",
    "cost_of",
    "disk_bytes",
    "machine_named",
    "machines",
    "nearest_change",
    "parameters_of",
    "plan_run",
    "shape_of",
]
