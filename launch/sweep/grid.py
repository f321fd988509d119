"""The cells of a sweep: every combination of the values that are given for settings, and of seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from launch.settings import load
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs.artifacts import digest_of

SEED = "seed"
OF_THE_SWEEP = ("name", "runs_dir", "tracking")  # the same for all cells
PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,30}")
Grid = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Plan:
    whole: RunConfig  # of the sweep itself: its name and folder, cluster and tracking
    grid: Grid  # dotted name → values, with the seeds
    cells: tuple[RunConfig, ...]


def plan(runfile: str, overrides: Sequence[str], seeds: int) -> Plan:
    """UserError (2) for settings that do not fit together in any of the cells, and for what is no grid."""
    base, grid = split(overrides)
    _check(grid, seeds)
    first = load(runfile, [*base, *_chosen({name: values[0] for name, values in grid.items()})])
    if SEED not in grid:
        grid |= {SEED: [str(first.seed + number) for number in range(seeds)]}
    whole = first.model_copy(update={"name": f"{first.name}-sweep"})
    cells = []
    for combination in _combinations(grid):
        config = load(runfile, [*base, *_chosen(combination)])
        cells.append(config.model_copy(update={"name": cell_name(combination), "runs_dir": whole.folder}))
    if (twice := _twice([config.name for config in cells])) is not None:
        raise UserError(f"two cells of the sweep have the name {twice}: give values that are not the same")
    return Plan(whole, grid, tuple(cells))


def split(tokens: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`--a 1 --b 2 3` → settings of all cells (`--a 1`), and values by the name of each setting with several."""
    base: list[str] = []
    grid: dict[str, list[str]] = {}
    groups: list[list[str]] = []
    for token in tokens:
        if token.startswith("--") or not groups:
            groups.append([token])
        else:
            groups[-1].append(token)
    for first, *values in groups:
        if len(values) < 2 or "=" in first:
            base += [first, *values]
        elif first.removeprefix("--") in grid:
            raise UserError(f"{first} is given twice; write all its values after one {first}")
        else:
            grid[first.removeprefix("--")] = values
    return base, grid


def cell_name(combination: Mapping[str, str]) -> str:
    """{"ppo.kl_coef": "0.01", "seed": "1"} → kl_coef-0_01-seed-1, the name of the cell's folder."""
    return "-".join(
        f"{short}-{_word(value)}" for short, value in zip(_short(combination), combination.values(), strict=True)
    )


def _check(grid: Grid, seeds: int) -> None:
    if not grid and seeds == 1:
        raise UserError("a sweep needs several values of a setting (--ppo.kl_coef 0.01 0.05) or --seeds of 2 or more")
    if SEED in grid and seeds > 1:
        raise UserError("both --seed with several values and --seeds are given; leave one out")
    for name, values in grid.items():
        if name.partition(".")[0] in OF_THE_SWEEP:
            raise UserError(f"--{name} has {len(values)} values, but it is the same for all cells of a sweep; give one")
        if (twice := _twice(values)) is not None:
            raise UserError(f"--{name} has the value {twice} twice")


def _combinations(grid: Grid) -> Iterator[dict[str, str]]:
    """The last setting, the seed, changes fastest."""
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _chosen(combination: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in combination.items()]


def _short(names: Mapping[str, str]) -> list[str]:
    """The last part of each dotted name; the whole where two have the same."""
    lasts = [name.rpartition(".")[2] for name in names]
    return [last if lasts.count(last) == 1 else _word(name) for name, last in zip(names, lasts, strict=True)]


def _word(value: str) -> str:
    """As part of a folder's name; a digest stands for what cannot be."""
    if PLAIN.fullmatch(value):
        return value.replace(".", "_")
    return f"{re.sub('[^A-Za-z0-9]+', '_', value)[:20].strip('_')}-{digest_of(value)[:8]}"


def _twice(values: Sequence[str]) -> str | None:
    return next((value for place, value in enumerate(values) if value in values[:place]), None)
