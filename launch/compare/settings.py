"""Which settings and data of runs differ, and which runs differ in nothing but the seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from launch.compare.record import RunRecord

SEED = "seed"
OF_NO_RESULT = ("data.root",)
Differences = dict[str, dict[str, str | None]]
"""Name → run → value; None where the run has none."""


def different_settings(runs: Sequence[RunRecord]) -> Differences:
    return _different(runs, lambda run: run.settings)


def different_data(runs: Sequence[RunRecord]) -> Differences:
    """Digests of data sets that are not the same in all runs."""
    return _different(runs, lambda run: run.data)


def variants(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of the same settings and data but for the seed, by what tells them from the others."""
    groups: dict[frozenset, list[RunRecord]] = {}
    for run in runs:
        same = {key: value for key, value in run.settings.items() if key != SEED and key not in OF_NO_RESULT}
        groups.setdefault(frozenset([*same.items(), *run.data.items()]), []).append(run)
    firsts = [group[0] for group in groups.values()]
    told = {key: of for key, of in different_settings(firsts).items() if key not in (SEED, *OF_NO_RESULT)}
    names = [", ".join(f"{key}={of[run.name]}" for key, of in told.items()) for run in firsts]
    if len({*names}) < len(names) or any(len(name) > 60 for name in names) or not told:
        names = [run.name for run in firsts]
    return dict(zip(names, groups.values(), strict=True))


def _different(runs: Sequence[RunRecord], of: Callable[[RunRecord], Mapping[str, str]]) -> Differences:
    names = dict.fromkeys(name for run in runs for name in of(run))
    found = {name: {run.name: of(run).get(name) for run in runs} for name in names}
    return {name: values for name, values in found.items() if len({*values.values()}) > 1}
