"""From a request to its response, at once or as a stream; a client that is gone frees its rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from launch.serve import errors
from launch.serve.answers import Answer, event
from launch.serve.guard import GuardedFlow, flow_of
from launch.serve.service import Service
from rlhf.serving.engine import EngineDown
from rlhf.serving.flow import Flow

CLIENT_GONE = 499  # as nginx says


async def at_once(service: Service, request: Request, answer: Answer) -> bool:
    """Collects all pieces. False where the client did not wait for them. QueueFull, EngineDown."""

    async def read() -> None:
        with service.watched(answer):
            async with await flow_of(service.guard, answer, service.metrics) as flow:
                async for number, piece in flow.pieces():
                    answer.add(number, piece)

    reading, leaving = asyncio.create_task(read()), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            await reading
        return reading.done()
    finally:
        for task in (reading, leaving):
            task.cancel()


async def whole(service: Service, request: Request, answer: Answer) -> Response:
    if await at_once(service, request, answer):
        return JSONResponse(answer.whole())
    return Response(status_code=CLIENT_GONE)


async def stream(service: Service, answer: Answer, with_usage: bool) -> Response:
    """Server-sent events. What is refused is refused before the stream begins: QueueFull, EngineDown."""
    flow = await flow_of(service.guard, answer, service.metrics)
    events = _events(service, flow, answer, with_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(service: Service, flow: Flow | GuardedFlow, answer: Answer, with_usage: bool) -> AsyncIterator[bytes]:
    """What fails in mid-stream is the last event, in the form of an error."""
    with service.watched(answer):
        async with flow:
            for opening in answer.openings():
                yield event(opening)
            try:
                async for number, piece in flow.pieces():
                    answer.add(number, piece)
                    if piece.text or piece.finish or piece.logprobs:
                        yield event(answer.chunk(number, piece))
            except EngineDown:
                yield event(errors.body(503, "the model failed while it responded; try again", "not_ready"))
                return
            if with_usage:
                yield event(answer.closing())
            yield b"data: [DONE]\n\n"


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
