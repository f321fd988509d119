"""`rlhf watch`: looks at the store again and again."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from rich.console import Console
from sqlalchemy.exc import DBAPIError

from launch.commands.arguments import tracking_uri
from launch.serve.feedback import FOLDER, existing
from launch.signals import Stop
from launch.watch.alarms import ring
from launch.watch.look import Look, look
from launch.watch.table import tables
from rlhf.config import TrackingConfig
from rlhf.errors import UserError
from rlhf.serving.store import Store
from rlhf.serving.watch import baseline, rules
from rlhf.tracking import NullTracker, Tracker, open_tracker

log = logging.getLogger(__name__)

MOST_BUCKETS = 6


def run(args: argparse.Namespace) -> int:
    given = rules.read(args.rules) if args.rules else None
    compared = _baseline(args)
    if compared is None and given and (drifting := [rule for rule in given.rules if rule.needs_baseline]):
        raise UserError(f"--rules {args.rules}: {drifting[0].metric} needs an evaluation: give --baseline DIR")
    store = existing(args.store)
    tracker = _tracker(args) if given else NullTracker()
    try:
        with Stop().handled() as stop:  # between two looks, so that no alarm is kept and not told
            while not stop.number:
                _tick(store, args, given, compared, tracker)
                if args.once:
                    return 0
                stop.sleep(args.every)
        return 128 + stop.number
    finally:
        tracker.close()
        store.close()


def _tick(
    store: Store,
    args: argparse.Namespace,
    given: rules.Rules | None,
    compared: baseline.Baseline | None,
    tracker: Tracker,
) -> None:
    now, own, buckets = time.time(), given.rules if given else [], buckets_of(Console().width)
    try:
        found = look(store, now, args.since, buckets, compared, own)
        if given and ring(store, own, found.found, now, given.webhook, tracker):
            found = look(store, now, args.since, buckets, compared, own)  # with the alarms that just began
    except DBAPIError as error:
        if args.once:
            raise UserError(f"--store {store.shown}: the database does not answer", 8) from error
        log.error("%s does not answer (%s); the watch goes on", store.shown, type(error.orig).__name__)
        return
    _show(found, args)


def buckets_of(width: int) -> int:
    """As many as a terminal shows beside the names and the whole."""
    return min(max((width - 40) // 18, 1), MOST_BUCKETS)


def _show(found: Look, args: argparse.Namespace) -> None:
    """Again and again only where somebody looks: a file would fill with tables."""
    console = Console()
    if args.once or console.is_terminal:
        if not args.once:
            console.clear()
        for table in tables(found, args.since):
            console.print(table)


def _baseline(args: argparse.Namespace) -> baseline.Baseline | None:
    """What is named, else the evaluation in the run's folder, if the store lies in one."""
    if args.baseline:
        return baseline.read(args.baseline)
    usual = None if "://" in args.store else baseline.usual(Path(args.store).absolute().parent)
    return baseline.read(usual) if usual else None


def _tracker(args: argparse.Namespace) -> Tracker:
    folder = Path(FOLDER if "://" in args.store else args.store) / "watch"
    return open_tracker(folder, TrackingConfig(uri=tracking_uri(args)), "watch", None, is_writer=True)
