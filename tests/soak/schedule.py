"""Which fault comes when: random, and the same for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice


class Kind(StrEnum):
    KILL = "worker killed"
    STOP = "worker stopped"
    DRIVER = "driver killed"
    TERM = "SIGTERM to the driver"
    SHORT_CUT = "node cut off for 5 s"
    CUT = "node cut off until noticed"
    RAY = "a node's Ray killed"
    NODE = "node lost and replaced"
    TRUNCATED = "newest checkpoint truncated"
    FLIPPED = "newest checkpoint altered"


# Of fifty faults: many of what costs 20 s, few of what is only noticed after 45 s.
DECK = {
    Kind.KILL: 25,
    Kind.DRIVER: 7,
    Kind.TERM: 5,
    Kind.STOP: 2,
    Kind.SHORT_CUT: 2,
    Kind.CUT: 2,
    Kind.RAY: 2,
    Kind.NODE: 1,
    Kind.TRUNCATED: 2,
    Kind.FLIPPED: 2,
}
WITH_ANOTHER_DRIVER = {Kind.DRIVER, Kind.TERM, Kind.TRUNCATED, Kind.FLIPPED}
OF_A_NODE = {Kind.SHORT_CUT, Kind.CUT, Kind.RAY, Kind.NODE}
LATEST_S = 2.0
SHARES = {"sft": 0.3, "reward": 0.2, "ppo": 0.5}  # of all checkpoints
ROOM = 2.2  # checkpoints per fault: it waits for one, and more are made until it strikes
SFT_STEPS, REWARD_STEPS = 32, 4  # per epoch
STEPS_PER_CHECKPOINT = {"sft": 16, "reward": 4, "ppo": 2}  # one or two seconds of work


@dataclass(frozen=True)
class Fault:
    number: int
    kind: Kind
    after_s: float  # from the moment at which there is a new checkpoint
    victim: float  # from 0 to 1, which of those that may be struck
    place: float  # from 0 to 1, which file, and where in it


def schedule(faults: int, seed: int) -> list[Fault]:
    """A shorter one is the beginning of a longer one."""
    return list(islice(_faults(random.Random(seed)), faults))


def _faults(chance: random.Random) -> Iterator[Fault]:
    number = 0
    while True:
        deck = [kind for kind, count in DECK.items() for _ in range(count)]
        chance.shuffle(deck)
        for kind in deck:
            number += 1
            yield Fault(number, kind, LATEST_S * chance.random(), chance.random(), chance.random())


def settings(faults: int) -> list[str]:
    """Settings that make the stages long enough for so many faults."""
    checkpoints = {stage: math.ceil(ROOM * share * faults) + 3 for stage, share in SHARES.items()}
    epochs = {
        stage: math.ceil((checkpoints[stage] + 1) * STEPS_PER_CHECKPOINT[stage] / steps)
        for stage, steps in (("sft", SFT_STEPS), ("reward", REWARD_STEPS))
    }
    every = STEPS_PER_CHECKPOINT["ppo"]
    return [
        *("--sft.packing", "false", "--sft.epochs", str(epochs["sft"]), "--sft.checkpoints", str(checkpoints["sft"])),
        *("--reward.epochs", str(epochs["reward"]), "--reward.checkpoints", str(checkpoints["reward"])),
        *("--ppo.iterations", str(checkpoints["ppo"] * every), "--ppo.checkpoint_every", str(every)),
        *("--ppo.eval_every", "4", "--ppo.patience", "1000"),
    ]
