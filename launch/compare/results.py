"""report.json of `rlhf compare`. docs/metrics.md defines every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.compare.record import Result, RunRecord
from launch.compare.settings import different_data, different_settings, variants
from launch.report import results
from rlhf.evaluation.comparison import difference_by_item, difference_by_seed, not_paired, over_seeds
from rlhf.evaluation.statistics import Estimate

Results = Mapping[tuple[str, str], Result]  # (part, metric) → result


def compare(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The first run is the one that the others are compared with."""
    found = {run.name: results(run.report) for run in runs}
    keys = list(dict.fromkeys(key for of_run in found.values() for key in of_run))
    first, *others = runs
    paired, reasons = {}, {}
    for run in others:
        paired[run.name], reasons[run.name] = _differences(run, first, keys)
    return {
        "runs": [
            {"name": run.name, "place": run.place, "finished": bool(run.report), "by_prompt": bool(run.rows)}
            for run in runs
        ],
        "baseline": first.name,
        "settings": different_settings(runs),
        "data": different_data(runs),
        "results": {name_of(key): {name: of[key] for name, of in found.items() if key in of} for key in keys},
        "differences": paired,
        "not_paired": {name: why for name, why in reasons.items() if why},
        "seeds": _seeds(runs, found),
        "curves": {run.name: run.curves for run in runs},
    }


def name_of(key: tuple[str, str]) -> str:
    return ".".join(key)


def _differences(
    run: RunRecord, first: RunRecord, keys: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Each metric of `run` minus that of `first` over the items that both measured, and why parts have none."""
    found, reasons = {}, {}
    for part in dict.fromkeys(part for part, _ in keys):
        a, b = run.rows.get(part, ()), first.rows.get(part, ())
        if not a and not b:
            continue
        if why := not_paired(a, b):
            reasons[part] = why
            continue
        for key in keys:
            if key[0] == part and (difference := difference_by_item(a, b, key[1])):
                found[name_of(key)] = difference.as_dict()
    return found, reasons


def _seeds(runs: Sequence[RunRecord], found: Mapping[str, Results]) -> dict[str, Any]:
    """Of every variant: mean of each metric over its seeds, and the difference to the first variant seed by seed.

    Empty where no variant has two seeds.
    """
    groups = variants(runs)
    if all(len({run.seed for run in group}) < 2 for group in groups.values()):
        return {}
    baseline = next(iter(groups))
    by_seed: dict[str, dict[str, dict[int, float]]] = {}  # variant → metric → seed → value
    for variant, group in groups.items():
        values: dict[str, dict[int, float]] = {}
        for run in group:
            for key, result in found[run.name].items():
                values.setdefault(name_of(key), {}).setdefault(run.seed, result["value"])
        by_seed[variant] = values
    return {
        "variants": {variant: [run.name for run in group] for variant, group in groups.items()},
        "baseline": baseline,
        "results": {
            variant: _known({metric: over_seeds(of) for metric, of in values.items()})
            for variant, values in by_seed.items()
        },
        "differences": {
            variant: _known({key: difference_by_seed(of, by_seed[baseline].get(key, {})) for key, of in values.items()})
            for variant, values in by_seed.items()
            if variant != baseline
        },
    }


def _known(estimates: Mapping[str, Estimate | None]) -> dict[str, Any]:
    return {name: one.as_dict() for name, one in estimates.items() if one is not None}
