"""The command's arguments as calls."""

from __future__ import annotations

import argparse

from launch.evaluate.policy.evaluate import evaluate_policy, show
from launch.evaluate.policy.policies import Settings
from launch.evaluate.policy.rewards import named


def run(args: argparse.Namespace) -> None:
    settings = Settings(
        samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        precision=args.precision,
        seed=args.seed,
        bad_rows=args.bad_rows,
    )
    tracking_uri = None if args.tracking_uri == "null" else args.tracking_uri
    report = evaluate_policy(args.models, args.prompts, named(args.reward), settings, args.out, tracking_uri)
    show(report, args.out)
