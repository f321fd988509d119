"""Errors in data: `DataError` for people, `BadRow` for a single row."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with lone surrogates escaped, because no terminal or file accepts them."""
    return text.encode("utf-8", "backslashreplace").decode()


class DataError(Exception):
    """Data that cannot be used. `message` says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = printable(message)


class BadRow(Exception):
    """One row that cannot be used. `kind` groups such rows in a report; `place` overrides the place of the row."""

    def __init__(self, reason: str, kind: str = "bad_row", place: str | None = None) -> None:
        super().__init__(reason)
        self.reason = printable(reason)
        self.kind = kind
        self.place = place
