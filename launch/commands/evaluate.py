"""`rlhf evaluate reward` and `rlhf evaluate policy`: reports on models."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.arguments import (
    above_0,
    add_scoring,
    add_tracking,
    command,
    positive,
    silence_deepspeed,
    tracking_uri,
)


def add(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("evaluate", help="reports on models", allow_abbrev=False)
    kinds = evaluate.add_subparsers(title="what is evaluated", metavar="KIND", required=True)
    _add_reward(kinds)
    _add_policy(kinds)


def _add_reward(kinds: argparse._SubParsersAction) -> None:
    reward = command(kinds, "reward", _evaluate_reward, "report what the scores of reward models are worth")
    reward.add_argument(
        "inputs",
        metavar="MODEL… DATA…",
        nargs="+",
        help="reward models (folders, hub names) and data: pairs in any form that training reads, RewardBench, RewardBench 2, "
        "lists of responses with scores; or `shipped`",
    )
    reward.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the report; goes on after a kill"
    )
    reward.add_argument(
        "--train", nargs="+", default=[], metavar="PAIRS", help="pairs on which a floor, the bag of words, is fitted"
    )
    reward.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="on Ray, each with the whole model (default 1: no Ray)"
    )
    reward.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster that is there (default: a private Ray on this machine)"
    )
    add_scoring(reward)
    add_tracking(reward)


def _add_policy(kinds: argparse._SubParsersAction) -> None:
    policy = command(kinds, "policy", _evaluate_policy, "report what policies say to the same prompts")
    policy.add_argument(
        "models", metavar="MODEL", nargs="+", help="a model's folder or hub name, or openai:MODEL@URL: an endpoint"
    )
    policy.add_argument(
        "--prompts", nargs="+", default=[], metavar="FILE", help="in any form that training reads; or `shipped`"
    )
    policy.add_argument(
        "--checkpoints",
        action="store_true",
        help="MODEL… are folders of runs: reward against KL over their evaluations",
    )
    policy.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the report; goes on after a kill"
    )
    policy.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME=REWARD",
        help="a reward model's folder, module:function or file.py:function; may be repeated",
    )
    policy.add_argument("--judge", metavar="MODEL@URL", help="an endpoint that compares the policies, in both orders")
    policy.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME", help="tasks of lm-eval, or YAML files of your own"
    )
    policy.add_argument("--samples", type=positive, default=1, metavar="N", help="responses per prompt (default 1)")
    policy.add_argument(
        "--temperature", type=above_0, nargs="+", default=[1.0], metavar="T", help="pairs use the first (default 1)"
    )
    policy.add_argument("--reference", metavar="MODEL", help="from which KL is measured; same tokenizer")
    policy.add_argument(
        "--refusal", metavar="PATTERN", help="how refusals begin, or module:function (default: usual English ones)"
    )
    policy.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="default 512")
    policy.add_argument("--seed", type=int, default=0, help="default 0")
    policy.add_argument(
        "--deadline", type=above_0, default=120.0, metavar="S", help="for a request to an endpoint (default 120 s)"
    )
    policy.add_argument(
        "--parallel", type=positive, default=8, metavar="N", help="requests to an endpoint at once (default 8)"
    )
    add_scoring(policy, batch_size=64)
    add_tracking(policy)


def _evaluate_reward(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.evaluate.reward import Options, evaluate_reward, show

    options = Options(
        batch_size=args.batch_size,
        precision=args.precision,
        bad_rows=args.bad_rows,
        train=args.train,
        tracking_uri=tracking_uri(args),
        workers=args.workers,
        ray_address=args.ray_address,
    )
    show(evaluate_reward(args.inputs, args.out, options), args.out)
    return 0


def _evaluate_policy(args: argparse.Namespace, _: list[str]) -> int:
    silence_deepspeed()
    from launch.evaluate.policy import checkpoints
    from launch.evaluate.policy.evaluate import evaluate_policy, show
    from launch.evaluate.policy.policies import Settings
    from launch.evaluate.policy.rewards import named
    from rlhf.errors import UserError
    from rlhf.evaluation.refusals import PATTERN

    if args.checkpoints:
        report = checkpoints.evaluate_checkpoints(args.models, args.out, tracking_uri(args))
        checkpoints.show(report, args.out)
        return 0
    if not args.prompts:
        raise UserError("--prompts FILE is missing: what the policies respond to, in any form that training reads")
    settings = Settings(
        samples=args.samples,
        temperature=args.temperature[0],
        more_temperatures=tuple(args.temperature[1:]),
        reference=args.reference,
        judge=args.judge,
        tasks=tuple(args.tasks),
        refusal=PATTERN if args.refusal is None else args.refusal,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        precision=args.precision,
        seed=args.seed,
        bad_rows=args.bad_rows,
        deadline_s=args.deadline,
        parallel=args.parallel,
    )
    report = evaluate_policy(args.models, args.prompts, named(args.reward), settings, args.out, tracking_uri(args))
    show(report, args.out)
    return 0
