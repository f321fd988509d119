"""When an alarm begins and when it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rlhf.errors import UserError
from rlhf.evaluation.statistics import Estimate
from rlhf.serving.watch.series import LENGTH, NAMES, REWARD
from rlhf.serving.watch.spans import seconds, shown

PSI, KS = "psi.", "ks_p."


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    metric: str
    op: Literal[">", "<"]
    value: float
    window: float = Field(default=3600.0, gt=0, description="Seconds, or 30m, 1h, 7d.")

    @field_validator("metric")
    @classmethod
    def _is_known(cls, name: str) -> str:
        drifting = name.removeprefix(PSI).removeprefix(KS)
        if name in NAMES or _is_reward(drifting) or (drifting != name and drifting == LENGTH):
            return name
        known = f"{', '.join(NAMES)}, {REWARD}NAME, {PSI}{LENGTH}, {PSI}{REWARD}NAME, {KS}{LENGTH}, {KS}{REWARD}NAME"
        raise ValueError(f"there is no metric {name}; there are {known}")

    @field_validator("window", mode="before")
    @classmethod
    def _in_seconds(cls, value: Any) -> Any:
        return seconds(value) if isinstance(value, str) else value

    @property
    def name(self) -> str:
        return f"{self.metric} {self.op} {self.value:g} in {shown(self.window)}"

    @property
    def needs_baseline(self) -> bool:
        return self.metric.startswith((PSI, KS))

    def begins(self, found: Estimate) -> bool:
        """The whole interval lies beyond the value, so that a few responses ring no alarm by chance."""
        return found.low > self.value if self.op == ">" else found.high < self.value

    def ends(self, found: Estimate) -> bool:
        """The estimate itself is back: later than the interval, so that an alarm does not ring again at every tick."""
        return found.value <= self.value if self.op == ">" else found.value >= self.value


class Rules(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rules: list[Rule] = Field(min_length=1)
    webhook: str | None = None

    @field_validator("webhook")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"https?://[^/\s]+", url):
            raise ValueError("a webhook begins with http:// or https://")
        return url


def read(path: Path) -> Rules:
    """UserError (2, 4) for a file that is none, with the key that is wrong."""
    try:
        return Rules.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--rules {path}: {error.strerror}", 4) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--rules {path}: it is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"--rules {path}: {key}: {first['msg']}") from None


def changes(rules: list[Rule], found: Mapping[str, Estimate], on: Mapping[str, Any]) -> tuple[list[Rule], list[Rule]]:
    """(rules whose alarm begins, rules whose alarm ends). `found`: by the name of the rule. `on`: the names of those that ring already. What nobody knows
    anything of stays as it is.
    """
    known = [rule for rule in rules if rule.name in found]
    begin = [rule for rule in known if rule.name not in on and rule.begins(found[rule.name])]
    return begin, [rule for rule in known if rule.name in on and rule.ends(found[rule.name])]


def _is_reward(name: str) -> bool:
    return name.startswith(REWARD) and len(name) > len(REWARD)
