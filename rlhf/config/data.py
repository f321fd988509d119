"""Settings of the data: which rows are read, and which are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rlhf.config.base import Count, Folder, Settings, Tag


class SourceConfig(Settings):
    """Rows of one file, folder or hub data set; `path: shipped` is the data of the project."""

    path: str
    format: Literal[
        "auto",
        "native",
        "hh",
        "pairs",
        "ultrafeedback",
        "helpsteer",
        "oasst",
        "pandalm",
        "compared",
        "ranked",
        "alpaca",
        "sharegpt",
        "messages",
        "answers",
        "prompts",
    ] = "auto"
    tag: Tag | None = None
    """Tag for rows without their own (None: helpful)."""
    split: str | None = None
    """`train` or `held_out` of shipped data; a split of a hub data set or of the files in a folder."""
    config: str | None = None
    """A subset of a hub data set, or a folder in it."""
    columns: dict[str, str] = {}
    """Which column holds what: {prompt: question, chosen: good, rejected: bad}. Empty: the names of the forms."""
    select_file: str | None = None
    """JSON file with lists of row numbers; only those under `select_key` are read."""
    select_key: str | None = None
    limit: Count | None = None


class RoleConfig(Settings):
    train: list[SourceConfig]
    held_out: list[SourceConfig] = []
    """Empty: `data.held_out_fraction` of the training prompts is set aside, by a hash of the prompt."""


class DataConfig(Settings):
    root: Folder = Path()
    """Relative source paths start here."""
    demonstrations: RoleConfig
    preferences: RoleConfig | None = None
    prompts: RoleConfig | None = None
    """None where no stage of the pipeline reads it."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    shared_prompts: Literal["refuse", "drop"] = "refuse"
    """What happens to training rows whose prompt is held out in any role."""
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1
    gold: Literal["none", "shipped"] = "none"
    """`shipped`: responses also get a gold score, their true quality, which only the shipped world has."""
