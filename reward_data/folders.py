"""Which files a path means: one file, a hub data set, or the files of a folder that belong to the split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reward_data.errors import DataError
from reward_data.files import SUFFIXES, is_data, is_hub_name, is_saved

SPLITS = {  # words in the name of a file or folder, and the split that they mean
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "tests", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("held_out", "heldout", "holdout", "hold_out"), "held_out"),
}
WORD = re.compile("|".join(rf"(?<![a-z])({word})(?![a-z])" for word in sorted(SPLITS, key=len, reverse=True)))
METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|(readme|licen[cs]e|citation|changelog).*|.*\.md", re.IGNORECASE
)
SHOWN = 5  # files named in one finding


@dataclass(frozen=True)
class Source:
    """Where rows come from: `files` on disk, or one hub data set. `findings` list what is not read of a folder."""

    files: tuple[Path, ...]
    hub: str = ""
    findings: tuple[str, ...] = ()


def find(path: str | Path, split: str | None = None, config: str | None = None) -> Source:
    """The data behind a file, a folder (searched with its subfolders) or a hub name `owner/name`; DataError if none.

    `split` picks files of a folder by the words in their names (default: train, and files that name no split),
    `config` a folder in it.
    """
    place = Path(path)
    if place.is_dir():
        return _folder(place / config if config else place, split)
    if place.exists():
        if split or config:
            key, value = ("split", split) if split else ("config", config)
            raise DataError(
                f"{path}: {key} {value!r} is for shipped data, hub data sets and folders; this is one file: drop {key}"
            )
        if not is_data(place.name):
            raise DataError(f"{path}: unknown kind of file; a name must end in {', '.join(SUFFIXES)}")
        return Source((place,))
    if is_hub_name(str(path)):
        return Source((), hub=str(path))
    raise DataError(f"{path}: no such file or folder")


def _folder(folder: Path, split: str | None) -> Source:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files, ignored = [], []
    for file, readable in _walk(folder, set()):
        (files if readable else ignored).append(file)
    if not files:
        names = f"; there are {_names(folder, ignored)}" if ignored else ""
        raise DataError(f"{folder}: the folder holds no {', '.join(SUFFIXES)} file{names}")
    split = None if split == "train" else split
    named = {file: _split_of(file.relative_to(folder)) for file in files}
    wanted = [file for file in files if (split in named[file] if split else named[file][0] in ("", "train"))]
    splits = ", ".join(sorted({names[0] for names in named.values() if names[0]})) or "none"
    if not wanted:
        asked = f"no file of split {split!r}" if split else "no file to train on"
        raise DataError(f"{folder}: {asked}; splits that its files name: {splits}; choose one with `split`")
    left = [file for file in files if file not in wanted]
    why = f"left out, of another split than {split or 'train'} (`split` chooses)"
    return Source(tuple(wanted), findings=(*_told(folder, left, why), *_told(folder, ignored, "ignored")))


def _walk(folder: Path, seen: set[Path]) -> Iterator[tuple[Path, bool]]:
    """(file, whether it is read), recursively and in order. Hidden files are left out, and so are links to files that were
    already seen."""
    seen.add(folder.resolve())
    if is_saved(folder):
        yield folder, True
        return
    for entry in sorted(folder.iterdir()):
        hidden = entry.name.startswith((".", "__"))
        real = entry.resolve()
        if entry.is_dir():
            if not hidden and real not in seen:
                yield from _walk(entry, seen)
        elif hidden or METADATA.fullmatch(entry.name):
            continue
        else:
            yield entry, is_data(entry.name) and entry.is_file() and os.access(entry, os.R_OK) and real not in seen
            seen.add(real)


def _split_of(file: Path) -> tuple[str, str]:
    """The split that a name means, and the name without its shard number: hub data sets have names such as train_sft."""
    parts = [*file.parts[:-1], file.name.split(".")[0]]
    label = re.sub(r"-\d+-of-\d+$", "", parts[-1])
    found = [SPLITS[word[0]] for part in reversed(parts) for word in WORD.finditer(part.lower())]
    return next((split for split in found if split != "train"), found[0] if found else ""), label


def _told(folder: Path, files: list[Path], why: str) -> tuple[str, ...]:
    return (f"{folder}: {len(files)} files {why}: {_names(folder, files)}",) if files else ()


def _names(folder: Path, files: list[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files[:SHOWN]]
    return ", ".join(names) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")
