"""What nodes say of themselves, compared: pure functions of the facts by the name of the node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from launch.doctor.facts import NodeFacts
from launch.doctor.result import CheckResult, ok

Facts = Mapping[str, NodeFacts]

LEAST_SHM = 1_000_000_000
LEAST_OPEN_FILES = 8192
SLOW_DISK = 20_000_000  # bytes per second
LARGEST_SKEW_S, SMALL_SKEW_S = 30.0, 2.0


def compare(facts: Facts, wanted_bytes: int, gpus_wanted: bool) -> Iterator[CheckResult]:
    yield from same_versions(facts)
    yield from same_code(facts)
    yield from same_model(facts)
    yield from memory_to_share(facts)
    yield from limits(facts)
    yield from disks(facts, wanted_bytes)
    yield from interfaces(facts)
    yield from (graphics(facts) if gpus_wanted else extensions(facts))


def same_versions(facts: Facts) -> Iterator[CheckResult]:
    odd = odd_ones({name: one.versions for name, one in facts.items()})
    for name, differences in odd.items():
        text = ", ".join(f"{key} {there} and not {usual}" for key, (there, usual) in differences.items())
        yield CheckResult("versions", name, "failed", text, "install from constraints.txt on every node")
    if not odd:
        first = next(iter(facts.values())).versions
        yield ok("versions", f"Python {first['python']}, torch {first['torch']}, Ray {first['ray']} everywhere")


def same_code(facts: Facts) -> Iterator[CheckResult]:
    odd = odd_ones({name: one.code for name, one in facts.items()})
    for name, differences in odd.items():
        shown = ", ".join([*list(differences)[:3], *(["…"] if len(differences) > 3 else [])])
        text = f"files of this project differ from those of the other nodes ({len(differences)}): {shown}"
        yield CheckResult("code", name, "failed", text, "check out one revision on every node, or share its folder")
    if not odd:
        yield ok("code", f"{len(next(iter(facts.values())).code)} files, the same everywhere")


def same_model(facts: Facts) -> Iterator[CheckResult]:
    if not any(one.model for one in facts.values()):
        return
    odd = odd_ones({name: one.model for name, one in facts.items()}, lacking_is_odd=True)
    for name, differences in odd.items():
        missing = [file for file, (there, _) in differences.items() if there is None]
        text = f"{', '.join(missing)} missing" if missing else f"{', '.join(differences)} of another size"
        remedy = "put the model's folder on storage that all nodes share, at the same path"
        yield CheckResult("model files", name, "failed", text, remedy, 4)
    if not odd:
        yield ok("model files", f"{len(next(iter(facts.values())).model)} files, of the same size everywhere")


def memory_to_share(facts: Facts) -> Iterator[CheckResult]:
    small = {
        name: one.shm_bytes for name, one in facts.items() if one.shm_bytes is not None and one.shm_bytes < LEAST_SHM
    }
    for name, free in small.items():
        remedy = "give the container more (docker run --shm-size 8g; a memory volume in Kubernetes)"
        yield CheckResult("/dev/shm", name, "warning", f"{_gigabytes(free)} are free, under 1 GB", remedy)
    if not small:
        least = min((one.shm_bytes for one in facts.values() if one.shm_bytes is not None), default=None)
        yield ok("/dev/shm", "not on this system" if least is None else f"at least {_gigabytes(least)} free")


def limits(facts: Facts) -> Iterator[CheckResult]:
    low = {name: one.open_files for name, one in facts.items() if one.open_files < LEAST_OPEN_FILES}
    for name, count in low.items():
        text = f"a process may open {count} files; Ray needs more with many workers"
        yield CheckResult("limits", name, "warning", text, f"ulimit -n {LEAST_OPEN_FILES} or more before `ray start`")
    if not low:
        yield ok("limits", f"{min(one.open_files for one in facts.values())} open files or more")


def disks(facts: Facts, wanted_bytes: int) -> Iterator[CheckResult]:
    good = True
    for name, one in facts.items():
        if one.disk_bytes < wanted_bytes:
            good = False
            text = f"about {_gigabytes(wanted_bytes)} are needed in runs_dir, {_gigabytes(one.disk_bytes)} are free"
            yield CheckResult("disk", name, "failed", text, "free some space or set runs_dir to another disk")
        elif one.disk_rate < SLOW_DISK:
            good = False
            text = f"runs_dir takes {one.disk_rate / 1e6:.0f} MB/s, a checkpoint {wanted_bytes / one.disk_rate:.0f} s"
            yield CheckResult("disk", name, "warning", text, "set runs_dir to faster storage, or checkpoint less often")
    if good:
        rate = min(one.disk_rate for one in facts.values()) / 1e6
        yield ok("disk", f"{_gigabytes(min(one.disk_bytes for one in facts.values()))} free, {rate:.0f} MB/s or more")


def interfaces(facts: Facts) -> Iterator[CheckResult]:
    good = True
    for name, one in facts.items() if len(facts) > 1 else ():  # one machine alone uses loopback
        if one.chosen_interface and one.chosen_interface not in one.interfaces:
            good = False
            text = f"NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME is {one.chosen_interface}, but there are {_list(one.interfaces)}"
            yield CheckResult(
                "interface", name, "failed", text, "set it to the one that reaches the others, at `ray start`"
            )
        elif not one.chosen_interface and len(one.interfaces) > 1:
            good = False
            text = f"there are {_list(one.interfaces)}, and none is chosen"
            remedy = "set NCCL_SOCKET_IFNAME (on CPUs GLOO_SOCKET_IFNAME) at `ray start`"
            yield CheckResult("interface", name, "warning", text, remedy)
    if good:
        chosen = {one.chosen_interface or _list(one.interfaces) or "loopback" for one in facts.values()}
        yield ok("interface", _list(sorted(chosen)))


def extensions(facts: Facts) -> Iterator[CheckResult]:
    missing = [name for name, one in facts.items() if not one.extension]
    for name in missing:
        text = "DeepSpeed's CPU communication is not compiled; the first stage waits a minute for it"
        yield CheckResult("extensions", name, "warning", text, "make install, on that node")
    if not missing:
        yield ok("extensions", "DeepSpeed's CPU communication is compiled")


def graphics(facts: Facts) -> Iterator[CheckResult]:
    """The same number of GPUs, of one model and with one driver, on every node that has some."""
    kinds = Counter(one.gpus for one in facts.values() if one.gpus)
    usual: tuple[str, ...] = kinds.most_common(1)[0][0] if kinds else ()
    for name, one in facts.items():
        if one.gpus and one.gpus != usual:
            text = f"{_list(one.gpus)}; on most nodes {_list(usual)}"
            yield CheckResult("GPUs", name, "warning", text, "use nodes of one kind: the slowest sets the pace")
    if not kinds:
        yield CheckResult("GPUs", "", "failed", "nvidia-smi shows none on any node", "set hardware.gpus_per_worker: 0")
    elif len(kinds) == 1:
        yield ok("GPUs", f"on each node {_list(usual)}")


def clocks(skews: Mapping[str, tuple[float, float]]) -> Iterator[CheckResult]:
    """`skews`: by node, seconds ahead of this machine, and how exactly that is known."""
    good = True
    for name, (skew, exactness) in skews.items():
        if abs(skew) - exactness > SMALL_SKEW_S:
            good = False
            verdict = "failed" if abs(skew) - exactness > LARGEST_SKEW_S else "warning"
            text = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine: heartbeats and logs are misread"
            yield CheckResult("clock", name, verdict, text, "run chrony or systemd-timesyncd on every node")
    if good and skews:
        largest = max(abs(skew) + exactness for skew, exactness in skews.values())
        yield ok("clock", f"within {largest:.3f} s of this machine")


def odd_ones(
    facts: Mapping[str, Mapping[str, Any]], lacking_is_odd: bool = False
) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Node → key → (what it has, what most have), of the nodes that differ from most. Where as many say one thing as
    another, the first node, which is the driver's, is right. `lacking_is_odd`: also where most lack it."""
    keys = dict.fromkeys(key for one in facts.values() for key in one)
    usual = {}
    for key in keys:
        values = [one.get(key) for one in facts.values() if key in one or not lacking_is_odd]
        usual[key] = Counter(values).most_common(1)[0][0]
    odd = {
        name: {key: (one.get(key), usual[key]) for key in keys if one.get(key) != usual[key]}
        for name, one in facts.items()
    }
    return {name: differences for name, differences in odd.items() if differences}


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _list(names: Any) -> str:
    return ", ".join(names)
