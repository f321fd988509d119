"""`python -m launch.testbed up 3`, `… down`, and what can be done to the nodes in between."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from launch.testbed.testbed import Testbed
from rlhf.errors import UserError

FOLDER = Path(tempfile.gettempdir(), "rlhf-testbed")
ON_A_NODE = {
    "cut": "pull its cable out",
    "heal": "put its cable back, or replace the slow one",
    "slow": "200 ms there and back, and 5 %% of the frames lost",
    "kill": "end it as a power cut does",
    "start": "bring it back after `kill`, with Ray",
}


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    testbed = Testbed(args.folder)
    try:
        if args.action == "up":
            testbed.up(args.nodes, args.cpus)
            print(f"{args.nodes} nodes; hardware.ray_address is {testbed.address}, shared storage {testbed.shared}")
        elif args.action == "down":
            testbed.down()
        elif args.action == "run":
            return testbed.popen(args.node, args.command).wait()
        else:
            getattr(testbed, args.action)(args.node)
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.testbed", description=sys.modules["launch.testbed"].__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where its state and files lie (default {FOLDER})")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    up = actions.add_parser("up", help="make nodes, with Ray on them; needs root")
    up.add_argument("nodes", metavar="NODES", type=int)
    up.add_argument("--cpus", type=int, default=1, help="of each node, as Ray counts them (default 1)")
    actions.add_parser("down", help="remove everything but logs and the shared folder")
    for name, text in ON_A_NODE.items():
        actions.add_parser(name, help=text).add_argument("node", metavar="NODE", type=int)
    run = actions.add_parser("run", help="a command on a node, in the shared folder")
    run.add_argument("node", metavar="NODE", type=int)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
