"""The commands of `rlhf`: their arguments, and what each calls. What a command does stays in a package of its own.

Every file has `add(commands)`, and imports libraries only when its command runs, so that `--help` is there at once.
"""

from launch.commands import compare, evaluate, lineage, models, plan, promote, runs, serve, sweep, watch

ALL = (runs, sweep, plan, models, evaluate, compare, lineage, promote, serve, watch)
