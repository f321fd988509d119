"""A Ray cluster of pseudo-nodes on one Linux machine, for tests: `python -m launch.testbed up 3`.

Each node has its own network, PIDs, mounts, host name, /dev/shm and /tmp. They share the project, its installation and
one folder, and meet at a switch, whose cables can be pulled out or made slow. All of them live in the PID namespace of
the switch, so the kernel removes everything when that process ends, however it ends.
"""

from launch.testbed.testbed import Testbed

__all__ = ["Testbed"]
