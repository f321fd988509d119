"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf.errors import UserError

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class CheckResult:
    check: str
    where: str
    """Which node, pair of nodes or setting; "" for all."""
    verdict: Verdict
    why: str
    what_to_do: str = ""
    exit_code: int = 5


def ok(check: str, why: str, where: str = "") -> CheckResult:
    return CheckResult(check, where, "ok", why)


def raise_failed(results: Iterable[CheckResult]) -> None:
    """UserError with all that failed; its exit code is that of the first."""
    failed = [one for one in results if one.verdict == "failed"]
    if failed:
        raise UserError("\n  ".join(["the run cannot start:", *map(in_a_line, failed)]), failed[0].exit_code)


def in_a_line(one: CheckResult) -> str:
    return ": ".join(filter(None, (", ".join(filter(None, (one.check, one.where))), one.why, one.what_to_do)))
