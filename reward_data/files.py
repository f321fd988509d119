"""Rows of a file, a saved data set or a hub data set, each with its place.

A row is whatever the file holds, usually a dict; `converters` interpret it.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from reward_data.csv_rows import csv_rows
from reward_data.errors import DataError
from reward_data.json_rows import json_rows
from reward_data.rows import Row, too_long

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS[:5] for packed in PACKED))
LFS_HEADER = b"version https://git-lfs.github.com/spec/"
SAVED = ("state.json", "dataset_info.json")  # what `save_to_disk` of the datasets library leaves beside the rows


PIECE = 1 << 20
MOST_TIMES = 100  # text is seldom compressed to less than a twentieth
NEVER_TOO_MUCH = 256 << 20  # bytes
MOST_ROWS = 100_000_000  # that a parquet file may announce


def is_data(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_hub_name(path: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not is_data(path)


def is_csv(file: Path) -> bool:
    return bool(re.search(r"\.[ct]sv(\.\w+)?$", file.name.lower()))


def is_saved(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SAVED)


def read_rows(file: Path) -> Iterator[Row]:
    """Rows of one file, or of one folder of `save_to_disk`. DataError if the file itself cannot be read."""
    if file.is_dir():
        return _saved_rows(file)
    name, data = file.name.lower(), _bytes_of(file)
    if name.endswith(".parquet"):
        return _parquet_rows(file, data)
    if name.endswith(".arrow"):
        return _arrow_rows(file, data)
    text = _text_of(file, data)
    return csv_rows(file, io.StringIO(text, newline="")) if is_csv(file) else json_rows(file, text)


def digest_of(files: list[Path]) -> str:
    """SHA-256 of the one file, or of the list of digests of several."""
    parts = [part for file in files for part in (sorted(file.glob("*.arrow")) if file.is_dir() else [file])]
    digests = [hashlib.sha256(f.read_bytes()).hexdigest() for f in parts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def digest_of_rows(rows: Iterable[Row]) -> str:
    """SHA-256 of rows without a file."""
    lines = (json.dumps(row.value, sort_keys=True, default=str) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hub_rows(name: str, split: str, config: str | None = None) -> Iterator[Row]:
    """Rows of a hub data set, through the `datasets` library. `config`: a subset, or else a folder in it."""
    try:
        from datasets import load_dataset

        if config is None:
            rows = load_dataset(name, split=split)
        else:
            try:
                rows = load_dataset(name, config, split=split)
            except ValueError as error:
                if "BuilderConfig" not in str(error):
                    raise
                rows = load_dataset(name, data_dir=config, split=split)
    except Exception as error:  # noqa: BLE001 - of many types: no network, no such set, no such split, no library
        first, *others = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join([first, *(line for line in others if "available" in line)])  # names of subsets
        asked = f"split {split}" + (f" in config {config}" if config else "")
        raise DataError(f"{name}: no such file, and no hub data set with {asked}: {reason}") from None
    return (Row(dict(row), f"{name}[{split}]:{n}") for n, row in enumerate(rows, 1))


def _bytes_of(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if data.startswith(LFS_HEADER):
        raise DataError(f"{file}: a Git LFS pointer, not the data itself; fetch the data with `git lfs pull`")
    if unpack := UNPACK.get(file.suffix.lower()):
        kind = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower(), file.suffix.lower()[1:])
        try:
            data = _unpacked(file, data, unpack)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{file}: not a whole {kind} file: {error}") from None
    if not data.strip():
        raise DataError(f"{file}: the file is empty")
    return data


def _unpacked(file: Path, data: bytes, open_stream: Callable[[bytes], Any]) -> bytes:
    """The content of a compressed file. DataError where it is so much more that memory may not hold it."""
    most = max(MOST_TIMES * len(data), NEVER_TOO_MUCH)
    pieces, total, stream = [], 0, open_stream(data)
    while piece := stream.read(PIECE):
        pieces.append(piece)
        total += len(piece)
        if total > most:
            raise DataError(
                f"{file}: unpacks to over {total / 1e6:,.0f} MB, more than {MOST_TIMES} times its size. If that is right, "
                "unpack it yourself and name the unpacked file"
            )
    return b"".join(pieces)


def _open_zst(data: bytes) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd")


UNPACK: dict[str, Callable[[bytes], Any]] = {
    ".gz": lambda data: gzip.GzipFile(fileobj=io.BytesIO(data)),
    ".bz2": lambda data: bz2.BZ2File(io.BytesIO(data)),
    ".xz": lambda data: lzma.LZMAFile(io.BytesIO(data)),  # noqa: SIM115  read to its end, and no file
    ".zst": _open_zst,
}


def _text_of(file: Path, data: bytes) -> str:
    encoding = json.detect_encoding(data)  # UTF-8, or by its mark or its zero bytes UTF-16 or UTF-32
    lines = re.search(r"\.(jsonl|ndjson)(\.\w+)?$", file.name.lower()) and not _is_binary(data)
    try:  # a row of JSON lines may hold other bytes, and is a bad row then
        text = data.decode(encoding, "surrogateescape" if lines else "strict").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: not UTF-8 text (byte {error.start}); is this a binary file? Text of another encoding: "
            "convert it (iconv -f WINDOWS-1252 -t UTF-8)"
        ) from None
    if "\0" in text and not lines:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{file}:{line}: holds a zero byte; is this a binary file?")
    if not text.strip():
        raise DataError(f"{file}: the file is empty")
    return text


def _is_binary(data: bytes) -> bool:
    """Whether half of the lines or more are no UTF-8 text: then the file is not what its name says, or in another encoding."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    return 2 * sum(not _is_text(line) for line in lines) >= len(lines)


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in line


def _parquet_rows(file: Path, data: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(pyarrow.BufferReader(data)).num_rows
        if rows > MOST_ROWS:
            raise DataError(f"{file}: announces {rows:,} rows, and {MOST_ROWS:,} are the most; split the file")
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from None
    return _table_rows(file, table.to_pylist())


def _arrow_rows(file: Path, data: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.ipc

    for opened in (pyarrow.ipc.open_stream, pyarrow.ipc.open_file):
        try:
            return _table_rows(file, opened(pyarrow.BufferReader(data)).read_all().to_pylist())
        except (pyarrow.ArrowException, OSError):
            continue
    raise DataError(f"{file}: not an Arrow file")


def _saved_rows(folder: Path) -> Iterator[Row]:
    try:
        from datasets import load_from_disk

        return _table_rows(folder, list(map(dict, iter(load_from_disk(str(folder))))))
    except Exception as error:  # noqa: BLE001 - of many types, as the library has them
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(f"{folder}: the data set that was saved here cannot be read: {reason[0]}") from None


def _table_rows(file: Path, rows: list[Any]) -> Iterator[Row]:
    if not rows:
        raise DataError(f"{file}: the file holds no rows")
    return (table_row(row, f"{file}:{number}") for number, row in enumerate(rows, 1))


def table_row(value: Any, place: str) -> Row:
    fault = too_long(_characters(value))
    return Row(None if fault else value, place, fault)


def _characters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str | bytes) else 0
