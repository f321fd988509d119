"""The evaluation that a served model is compared with: its rewards and lengths, response by response."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.evaluation import held_out
from rlhf.evaluation.drift import Drift, drift
from rlhf.serving.watch.records import Observed
from rlhf.serving.watch.series import LENGTH, REWARD, values_of

CANDIDATE = "candidate"  # as `rlhf promote` calls the model that became the champion
RESPONSES = "responses.jsonl"


@dataclass(frozen=True)
class Baseline:
    source: Path
    values: Mapping[str, Sequence[float]]
    """By metric: reward.NAME, length."""

    def drifts(self, rows: Sequence[Observed]) -> dict[str, Drift]:
        """Of what is known on both sides. The newest response of each cluster is independent of the others."""
        found = {}
        for name, there in self.values.items():
            here = values_of(rows, name)
            if here and there:
                found[name] = drift(there, [value for _, value in here], list(dict(here).values()))
        return found


def usual(run: Path) -> Path | None:
    """The evaluation of the promotion in a run's folder, else what its policy was measured on."""
    places = [*sorted(run.glob(f"*/promotion/{RESPONSES}")), *sorted(run.glob(f"ppo/artifact/{held_out.FILE}"))]
    return places[0].parent if places else None


def read(folder: Path) -> Baseline:
    """A folder of `rlhf evaluate policy` or `rlhf promote`, a run, or an artifact. UserError (3, 4) without responses."""
    for file in (folder / RESPONSES, folder / "promotion" / RESPONSES):
        if file.is_file():
            return Baseline(folder, _of_lines(file))
    for file in (
        folder / held_out.FILE,
        folder / "artifact" / held_out.FILE,
        folder / "ppo" / "artifact" / held_out.FILE,
    ):
        if file.is_file():
            return Baseline(folder, _of_held_out(held_out.read(file)))
    raise UserError(
        f"--baseline {folder}: it has no {RESPONSES} (`rlhf evaluate policy`, `rlhf promote`) and no {held_out.FILE} "
        "(a run of this version)",
        4,
    )


def _of_lines(file: Path) -> dict[str, list[float]]:
    """Of one model: the only one, or the candidate of a promotion; at one temperature."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    models = {line["model"] for line in lines}
    if len(models) > 1 and CANDIDATE not in models:
        raise UserError(f"--baseline {file}: responses of {', '.join(sorted(models))}; name an evaluation of one", 3)
    lines = [line for line in lines if len(models) == 1 or line["model"] == CANDIDATE]
    lines = [line for line in lines if line.get("temperature") == lines[0].get("temperature")]
    names = sorted({name for line in lines for name in line["scores"]})
    found = {REWARD + name: _known(line["scores"].get(name) for line in lines) for name in names}
    return found | {LENGTH: _known(line["length"] for line in lines)}


def _of_held_out(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    names = sorted({name for row in rows for name in row if name == LENGTH or name.startswith(REWARD)})
    return {name: _known(row.get(name) for row in rows) for name in names}


def _known(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None]
