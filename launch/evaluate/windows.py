"""A file of lines in windows. The first line says what they are of. A window ends with a line that commits it: after a kill
the windows that have one are kept, and the work goes on behind them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.tracking.jsonl import read_lines


class WindowFile:
    def __init__(self, path: Path, digest: str) -> None:
        """Opens the file where it ended. ValueError if it is of something else."""
        self.path = path
        self.windows: dict[str, int] = {}  # committed, by model
        end = 0
        for line, offset in read_lines(path):
            if not end and line.get("digest") != digest:
                raise ValueError(path)
            if "window" in line:
                self.windows[line["model"]] = line["window"] + 1
            if "window" in line or "digest" in line:
                end = offset
        with path.open("ab") as stream:
            stream.truncate(end)
        if not end:
            self._append([{"digest": digest}])

    @classmethod
    def of(cls, path: Path, digest: str) -> WindowFile:
        """As the constructor; begun anew where it is of something else."""
        try:
            return cls(path, digest)
        except ValueError:
            path.unlink()
            return cls(path, digest)

    def commit(self, model: str, lines: Sequence[Mapping[str, Any]], **facts: Any) -> None:
        """Appends the next window of a model, and `facts` about it."""
        number = self.windows.get(model, 0)
        self._append([{"model": model, **line} for line in lines] + [{"model": model, "window": number, **facts}])
        self.windows[model] = number + 1

    def lines(self, model: str) -> Iterator[dict[str, Any]]:
        return (line for line, _ in read_lines(self.path) if line.get("model") == model and "window" not in line)

    def facts(self, model: str) -> list[dict[str, Any]]:
        return [line for line, _ in read_lines(self.path) if line.get("model") == model and "window" in line]

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("ab") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
