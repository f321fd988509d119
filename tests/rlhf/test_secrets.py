"""What is a secret in a text, one kind at a time."""

from __future__ import annotations

import pytest

from rlhf.config import names_secret, without_secrets


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("postgresql://me:p4ss@db:5432/mlflow", "postgresql://db:5432/mlflow"),
        ("https://me@hub/x?y", "https://hub/x?y"),
        ("http://h/a?api_token=abc&b=1", "http://h/a?api_token=***&b=1"),
        ("http://h/a?b=1&PASSWORD=abc#c", "http://h/a?b=1&PASSWORD=***#c"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        ("authorization: basic YWJjOmRlZg==", "authorization: basic ***"),
        ("it is hf_" + "a1" * 12, "it is ***"),
        ("it is sk-" + "a1-" * 8 + "z", "it is ***"),
        ("it is ghp_" + "a" * 24, "it is ***"),
        ("it is AKIA" + "A1" * 8, "it is ***"),
        ("a@b and hf_short, Bearer of", "a@b and hf_short, Bearer of"),
    ],
)
def test_each_kind_is_taken_out_and_the_rest_stays(text: str, left: str) -> None:
    assert without_secrets(text) == left


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("mlflow_tracking_password", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("GOOGLE_CREDENTIALS", True),
        ("HF_TOKEN_PATH", False),
        ("KEYBOARD", False),
        ("HF_HOME", False),
    ],
)
def test_a_variable_is_known_by_the_end_of_its_name(name: str, secret: bool) -> None:
    assert names_secret(name) == secret


def test_values_of_the_environment_are_taken_out_the_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_PASSWORD", "sesame")
    monkeypatch.setenv("B_PASSWORD", "sesame-street")
    monkeypatch.setenv("C_PASSWORD", "abc")  # too short: it would be found in ordinary text
    monkeypatch.setenv("D_HOME", "at-home")
    assert without_secrets("abc: sesame-street, sesame, at-home") == "abc: ***, ***, at-home"


def test_mappings_and_lists_are_gone_through() -> None:
    planted, kept = "https://me:x@h", "https://h"
    assert without_secrets({planted: [planted, (planted, 1)], "n": None}) == {kept: [kept, [kept, 1]], "n": None}
