"""The command's arguments as calls."""

from __future__ import annotations

import argparse

from launch.evaluate.policy import checkpoints
from launch.evaluate.policy.evaluate import evaluate_policy, show
from launch.evaluate.policy.policies import Settings
from launch.evaluate.policy.rewards import named
from rlhf.errors import UserError
from rlhf.evaluation.refusals import PATTERN


def run(args: argparse.Namespace) -> None:
    tracking_uri = None if args.tracking_uri == "null" else args.tracking_uri
    if args.checkpoints:
        checkpoints.show(checkpoints.evaluate_checkpoints(args.models, args.out, tracking_uri), args.out)
        return
    if not args.prompts:
        raise UserError("--prompts FILE is missing: what the policies respond to, in any form that training reads")
    settings = Settings(
        samples=args.samples,
        temperature=args.temperature[0],
        more_temperatures=tuple(args.temperature[1:]),
        reference=args.reference,
        refusal=PATTERN if args.refusal is None else args.refusal,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        precision=args.precision,
        seed=args.seed,
        bad_rows=args.bad_rows,
    )
    report = evaluate_policy(args.models, args.prompts, named(args.reward), settings, args.out, tracking_uri)
    show(report, args.out)
