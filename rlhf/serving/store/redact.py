"""Texts without personal data of forms that patterns find: mail addresses, telephone and card numbers, IBANs, IP addresses.

Names and postal addresses have no form; they stay.
"""

from __future__ import annotations

import re

from rlhf.config import without_secrets

PATTERNS = {
    "[email]": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "[iban]": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"),
    "[card]": re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])"),
    "[ip]": re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"),
    "[phone]": re.compile(
        r"(?<![\w.])(?:\+|00)\d{1,3}(?:[ .()/-]{0,2}\d){6,13}(?![\d.])"  # from abroad
        r"|(?<![\w.])\(?0\d{1,5}\)?[ ./-](?:[ .-]?\d){4,9}(?![\d.])"
        r"|(?<![\w.])\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?![\d.])"
        r"|(?<!\d)1[3-9]\d{9}(?!\d)"  # China
    ),
}


def redacted(text: str) -> str:
    """Tokens and passwords of known forms are left out too."""
    for name, pattern in PATTERNS.items():
        text = pattern.sub(lambda found, name=name: name if _is(name, found[0]) else found[0], text)
    return without_secrets(text)


def _is(name: str, text: str) -> bool:
    return name != "[card]" or _luhn([int(digit) for digit in text if digit.isdigit()])


def _luhn(digits: list[int]) -> bool:
    """The check digit that card numbers have (ISO/IEC 7812), so that other long numbers stay."""
    doubled = [digit if place % 2 == 0 else 2 * digit - 9 * (digit > 4) for place, digit in enumerate(digits[::-1])]
    return sum(doubled) % 10 == 0
