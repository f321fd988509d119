"""Servers under load: `rlhf serve` beside `transformers serve` and vLLM's server, on the same model and machine.

    python -m benchmarks.serving MODEL

64 clients ask over loopback, each its next request as soon as the last was answered, for two minutes of each server in turn.
Requests are the same for all: chat, streamed, at temperature 1. Tokens are counted by the model's tokenizer in the text that
came within that time. Time to the first token is that to the first text; who still waits for it at the end counts with the time
so far, which flatters a slow server. vLLM takes part where it is installed (`make vllm`). Load average and the rate of
a matrix product are measured before each server.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx2
import numpy as np
import torch

from rlhf.models import load_tokenizer

TOKEN = "a-token-of-this-benchmark"
START_S = 300.0  # a server is there by then
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
TOPICS = [
    "rain",
    "bread",
    "maps",
    "chess",
    "rivers",
    "clocks",
    "music",
    "gardens",
    "bridges",
    "letters",
    "winter",
    "ships",
    "paper",
    "glass",
    "stars",
    "tea",
]
ASKS = [
    "Tell me about {}.",
    "Write three sentences about {}.",
    "Why do people like {}?",
    "What should I know about {}?",
]
VLLM = ["--dtype", "float32", "--max-model-len", "1024"]


def commands(model: str, port: int, clients: int) -> dict[str, list[str]]:
    """How each server is started."""
    at, here = ["--port", str(port)], Path(sys.executable).parent
    ours = [sys.executable, "-m", "launch.cli", "serve", model, *at, "--rate", "0", "--store", "none"]
    theirs = [str(here / "transformers"), "serve", model, *at, "--host", "127.0.0.1"]
    found = {"rlhf": ours, "transformers": theirs, "transformers, continuous": [*theirs, "--continuous-batching"]}
    if importlib.util.find_spec("vllm"):
        many = ["--max-num-seqs", str(clients)]
        # Its command looks for a package called vllm, which the build for CPUs is not.
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        found["vllm"] = [*server, *at, "--host", "127.0.0.1", *VLLM, *many]
    return found


@dataclass
class Asked:
    """One request: when its texts came, in seconds from its start."""

    started: float
    first_s: float | None = None
    text: str = ""
    ended: bool = False
    error: str = ""


@dataclass
class Load:
    """All requests to one server."""

    asked: list[Asked] = field(default_factory=list)

    def summary(self, count: Any, seconds: float, now: float) -> dict[str, Any]:
        """`count`: the tokens of a text. `now`: when the load ended."""
        first = [now - one.started if one.first_s is None else one.first_s for one in self.asked if not one.error]
        p50, p95 = np.percentile(first, [50, 95]) if first else (float("nan"), float("nan"))
        return {
            "requests": len(self.asked),
            "answered": sum(one.ended for one in self.asked),
            "errors": sum(bool(one.error) for one in self.asked),
            "first_token_p50_s": float(p50),
            "first_token_p95_s": float(p95),
            "tokens_per_s": sum(count(one.text) for one in self.asked) / seconds,
            "error": next((one.error for one in self.asked if one.error), ""),
        }


async def pressed(url: str, model: str, clients: int, seconds: float, max_tokens: int) -> tuple[Load, float]:
    """What came of `clients` that ask until `seconds` are over."""
    load, numbers = Load(), iter(range(1 << 30))
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, headers=HEADERS, timeout=None, limits=limits) as http:

        async def client() -> None:
            while True:
                number = next(numbers)
                one = Asked(time.monotonic())
                load.asked.append(one)
                try:
                    await _ask(http, body_of(number, model, max_tokens), one)
                except (httpx2.HTTPError, ValueError) as error:
                    one.error = f"{type(error).__name__}: {error}"[:200]
                    await asyncio.sleep(0.2)

        tasks = [asyncio.create_task(client()) for _ in range(clients)]
        broken, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        now = time.monotonic()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in broken:
            task.result()  # raises
    return load, now


async def _ask(http: httpx2.AsyncClient, body: dict[str, Any], one: Asked) -> None:
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for text in texts(response.aiter_lines()):
            if one.first_s is None:
                one.first_s = time.monotonic() - one.started
            one.text += text
    one.ended = True


async def texts(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The texts of a stream of events. ValueError for an error, and where the stream ends without its end."""
    finished = False
    async for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ValueError(str(event["error"]))
        for choice in event["choices"]:
            finished = finished or choice.get("finish_reason") is not None  # some leave it out until the end
            if content := choice["delta"].get("content"):
                yield content
    if not finished:
        raise ValueError("the stream ended too early")


def body_of(number: int, model: str, max_tokens: int) -> dict[str, Any]:
    ask = ASKS[number % len(ASKS)].format(TOPICS[number // len(ASKS) % len(TOPICS)])
    asked = {"model": model, "messages": [{"role": "user", "content": ask}], "max_tokens": max_tokens}
    return asked | {"temperature": 1.0, "stream": True}


@contextmanager
def started(command: Sequence[str], url: str, threads: int) -> Iterator[None]:
    """RuntimeError with the end of its log if the server does not come up."""
    extra = {"OMP_NUM_THREADS": str(threads), "RLHF_SERVE_TOKEN": TOKEN, "VLLM_CPU_KVCACHE_SPACE": "2"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | extra, start_new_session=True)
        try:
            if not _comes(process, url):
                raise RuntimeError(f"{command[0]} did not come up:\n{_end_of(log)}")
            yield
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} has died:\n{_end_of(log)}")
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_of(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-2000:]


def _comes(process: subprocess.Popen, url: str) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                return True
        except httpx2.HTTPError:
            time.sleep(0.5)
    return False


def machine(threads: int) -> dict[str, float]:
    """The best of five rates of a matrix product, and the load average of the last minute."""
    torch.set_num_threads(threads)
    a, rates = torch.randn(2048, 2048), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5):
            torch.mm(a, a)
        rates.append(5 * 2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return {"gflops": max(rates), "load": os.getloadavg()[0]}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    port, found = free_port(), machine(args.threads)
    url = f"http://127.0.0.1:{port}"
    tokenizer = load_tokenizer(args.model)
    with started(commands(args.model, port, args.clients)[name], url, args.threads):
        asyncio.run(pressed(url, args.model, args.clients, args.warm_up, 8))
        load, now = asyncio.run(pressed(url, args.model, args.clients, args.seconds, args.max_tokens))

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return {"server": name, **load.summary(count, args.seconds, now), **found}


def shown(results: Sequence[dict[str, Any]]) -> str:
    head = (
        "| server | requests | answered | errors | first token, p50, s | p95, s | tokens/s | GFLOP/s | load average |"
    )
    lines = [head, "|" + "---|" * 9]
    for one in results:
        first = f"{one['first_token_p50_s']:.2f} | {one['first_token_p95_s']:.2f} | {one['tokens_per_s']:.0f}"
        counts = f"{one['requests']} | {one['answered']} | {one['errors']}"
        lines.append(f"| {one['server']} | {counts} | {first} | {one['gflops']:.0f} | {one['load']:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds of load before, which do not count")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--servers", nargs="+", choices=list(commands("", 0, 0)), default=list(commands("", 0, 0)))
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args(argv)
    results = []
    for name in args.servers:
        try:
            results.append(measured(name, args))
        except RuntimeError as error:  # the others are measured all the same
            print(f"{name}: {error}", flush=True)
            continue
        print(json.dumps(results[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
    print(shown(results))
    return results


if __name__ == "__main__":
    main()
