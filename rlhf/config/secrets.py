"""Texts without credentials, for whatever is shown or stored."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

CREDENTIALS = re.compile(r"(?<=://)[^/?#\s'\"]*@")
SECRET_KEY = re.compile(r"([?&][\w.-]*(?:password|passwd|pwd|token|secret|key)=)[^&#\s'\"]*", re.IGNORECASE)
BEARER = re.compile(r"((?:Bearer|Basic) )[\w.~+/=-]{8,}", re.IGNORECASE)
KNOWN = re.compile(r"\b(?:hf_\w{20,}|sk-[\w-]{20,}|gh[a-z]_\w{20,}|github_pat_\w{20,}|(?:AKIA|ASIA)[0-9A-Z]{16})\b")
VARIABLE = re.compile(r"(?:TOKEN|PASSWORD|PASSWD|PASS|SECRET|KEY|KEY_ID|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 6  # characters; a shorter value would be found in ordinary text


def names_secret(variable: str) -> bool:
    """Whether a variable of the environment is named like one that holds a secret, such as HF_TOKEN."""
    return VARIABLE.search(variable) is not None


def without_secrets(value: Any) -> Any:
    """`value` without secrets: user name and password in addresses, values of keys such as `token` after a `?`, tokens of
    known forms, and the values of variables of the environment that are named like a secret."""
    if isinstance(value, str):
        text = SECRET_KEY.sub(r"\1***", CREDENTIALS.sub("", value))
        text = KNOWN.sub("***", BEARER.sub(r"\1***", text))
        for secret in _of_environment():
            text = text.replace(secret, "***")
        return text
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def _of_environment() -> list[str]:
    """The longest first, as one may hold another."""
    values = {value for name, value in os.environ.items() if names_secret(name) and len(value) >= SHORTEST}
    return sorted(values, key=len, reverse=True)
