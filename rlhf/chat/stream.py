"""Text of a response while its tokens are sampled: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders give for a character of which bytes are missing


class TextStream:
    """Gives only text that later tokens cannot change. Without stop strings and with `strip` the pieces together are
    the stripped text of all tokens."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), strip: bool = True) -> None:
        """`strip`: without the white space at both ends."""
        self._decoder, self._stop, self._strip = _Decoder(tokenizer), _StopStrings(stop), strip
        self._spaces = ""  # at the end of what was given, withheld
        self.text = ""

    @property
    def stopped(self) -> bool:
        """A stop string has occurred; it and what follows is left out."""
        return self._stop.found

    def push(self, token: int) -> str:
        """What `token` makes certain."""
        return self._give(self._stop.push(self._decoder.push(token)))

    def finish(self) -> str:
        """The rest, with whatever half character the ids ended in."""
        return self._give(self._stop.push(self._decoder.finish()) + self._stop.finish())

    def _give(self, new: str) -> str:
        if self._strip:
            new = self._spaces + new if self.text else new.lstrip()
            kept = new.rstrip()
            self._spaces, new = new[len(kept) :], kept
        self.text += new
        return new


class _Decoder:
    """Decodes the ids of the last characters only: the whole text for each token would cost its length squared.

    What one token adds depends on those before it (bytes of one character, the space of a first token), so the
    `context` is decoded with the new ids and without.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids of the last text that was given
        self._new: list[int] = []

    def push(self, token: int) -> str:
        self._new.append(token)
        text = self._text(self._context + self._new)
        return "" if text.endswith(UNFINISHED) else self._advance(text)

    def finish(self) -> str:
        return self._advance(self._text(self._context + self._new))

    def _advance(self, text: str) -> str:
        before = self._text(self._context) if self._context else ""
        if len(text) > len(before):
            self._context, self._new = self._new, []
        return text[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _StopStrings:
    """Withholds an end that may become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = tuple(stop), ""
        self.found = False

    def push(self, new: str) -> str:
        if self.found:
            return ""
        text = self._held + new
        places = [place for each in self._stop if (place := text.find(each)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        certain = len(text) - max((_overlap(text, each) for each in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
