"""`rlhf feedback`: the store of a served model, beside the server or after it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.evaluation.statistics import Estimate
    from rlhf.serving.store import Store

FOLDER, FILE = "feedback", "feedback.db"


def run(args: argparse.Namespace) -> int:
    return {"delete": _delete, "export": _export, "report": _report}[args.action](args)


def default_store(model: Path) -> Path:
    """In the folder of the model's run, else here: `model` may be RUN/STAGE/artifact."""
    run = model.absolute().parents[1]
    return run / FOLDER if model.name == "artifact" and (run / "data").is_dir() else Path(FOLDER)


def store_url(store: str) -> str:
    return store if "://" in store else f"sqlite:///{Path(store).absolute() / FILE}"


def existing(store: str) -> Store:
    """UserError (4) where no server has kept anything."""
    from rlhf.serving.store import Store

    if "://" not in store and not (Path(store) / FILE).is_file():
        raise UserError(f"--store {store}: it has no {FILE}; name the folder that `rlhf serve` says at its start", 4)
    return Store(store_url(store))


def _delete(args: argparse.Namespace) -> int:
    store = existing(args.store)
    deleted = store.delete_user(args.user)
    store.close()
    print(f"deleted: {deleted.exchanges} exchanges, {deleted.votes} votes")
    return 0


def _export(args: argparse.Namespace) -> int:
    from rlhf.serving.store.export import export

    store = existing(args.store)
    found = export(store.votes(), store.exchanges(), args.held_out)
    store.close()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in ("preferences", "demonstrations"):
        for split, rows in getattr(found, kind).items():
            file = args.out / f"{kind}.{split}.jsonl"
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            print(f"{file}: {len(rows)} rows")
    for reason, count in sorted(found.left_out.items()):
        print(f"left out: {count} ({reason})")
    return 0


def _report(args: argparse.Namespace) -> int:
    from rlhf.serving.store.raters import raters

    store = existing(args.store)
    found = raters(store.votes(), store.exchanges(), store.scores())
    store.close()
    print(f"votes on pairs: {found.votes}, of {found.raters} people with a name")
    alpha = "unknown: no pair has votes of two people that could differ" if found.alpha is None else _shown(found.alpha)
    print(f"agreement (Krippendorff's alpha, ordinal): {alpha}")
    if found.first_chosen:
        print(f"the response that is shown first is chosen: {_shown(found.first_chosen)}; without a bias of place 0.5")
    for name, estimate in found.reward_agrees.items():
        print(f"{name} prefers the chosen response: {_shown(estimate)}")
    return 0


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
