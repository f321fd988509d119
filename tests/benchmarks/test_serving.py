"""The load benchmark on a server of the test, and its figures by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.serving import Asked, Load
from tests.launch.serve.servers import TOKEN, running
from tests.rlhf.serving.models import make_folder


def test_clients_press_a_server_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEADERS", {"Authorization": f"Bearer {TOKEN}"})
    with running(make_folder(tmp_path / "model")) as server:
        load, now = asyncio.run(serving.pressed(server.url, "tiny", clients=4, seconds=5, max_tokens=2))
        found = load.summary(len, 2.0, now)
    assert found["errors"] == 0 and found["error"] == ""
    assert found["requests"] - 4 <= found["answered"] <= found["requests"]
    assert found["answered"] and found["tokens_per_s"] > 0
    assert 0 < found["first_token_p50_s"] <= found["first_token_p95_s"] < 5


def test_what_a_client_cannot_read_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("choices")

    monkeypatch.setattr(serving, "_ask", broken)
    with pytest.raises(KeyError, match="choices"):
        asyncio.run(serving.pressed("http://127.0.0.1:9", "tiny", clients=2, seconds=60, max_tokens=2))


def test_who_still_waits_counts_with_the_time_so_far() -> None:
    """First tokens after 1, 2, 3 s, one client that waits since 4 s, and one error; 12 characters in 10 s."""
    asked = [Asked(0.0, first, "abcd", True) for first in (1.0, 2.0, 3.0)]
    load = Load([*asked, Asked(6.0), Asked(0.0, error="refused")])
    found = load.summary(len, 10.0, now=10.0)
    assert (found["requests"], found["answered"], found["errors"]) == (5, 3, 1)
    assert (found["first_token_p50_s"], found["tokens_per_s"], found["error"]) == (2.5, 1.2, "refused")
    assert found["first_token_p95_s"] == pytest.approx(3.85)


END = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}'
PIECE = 'data: {"choices": [{"delta": {"content": "ab"}, "finish_reason": null}]}'
BRIEF = 'data: {"choices": [{"delta": {"content": "ab"}}]}'


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([PIECE, "", PIECE, END], ""),
        ([BRIEF, BRIEF, END], ""),
        ([PIECE], "too early"),
        ([PIECE, 'data: {"error": {"message": "no"}}'], "no"),
    ],
)
def test_a_stream_is_read_to_its_end(lines: Sequence[str], error: str) -> None:
    async def stream() -> AsyncIterator[str]:
        for line in [*lines, "data: [DONE]"]:
            yield line

    async def read() -> list[str]:
        return [text async for text in serving.texts(stream())]

    if error:
        with pytest.raises(ValueError, match=error):
            asyncio.run(read())
    else:
        assert asyncio.run(read()) == ["ab", "ab"]
