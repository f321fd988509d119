"""`rlhf doctor`: what would stop a run, or slow it down, before anything is spent.

result.py    what a check found                facts.py     what a node says of itself
nodes.py     facts of all nodes, compared      storage.py   files written on one node and read on another
network.py   all-reduce between nodes          room.py      whether the worker groups fit
services.py  tracking server, gated models     examiner.py  the process on each node that does this
examine.py   all of it, in order               table.py     for people
"""
