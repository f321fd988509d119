"""`rlhf plan`: what a run needs of memory and time on a machine, before anything starts.

command.py  from arguments to an exit code
machine.py  the machine that is meant: a named one, or this one
tables.py   the plan as text
"""
