"""The routes of `rlhf serve`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

from launch.serve import errors
from launch.serve.answers import Answer, Kind, Said
from launch.serve.errors import ApiError
from launch.serve.gate import Gate
from launch.serve.pages import add_page
from launch.serve.respond import CLIENT_GONE, at_once, stream, whole
from launch.serve.service import Service
from launch.serve.watching import add_watching
from rlhf.serving.engine import Pieces, deliver_here
from rlhf.serving.model import Ask, ServedModel
from rlhf.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    ErrorResponse,
    Prediction,
    PredictRequest,
    Turn,
    Voted,
    VoteRequest,
)
from rlhf.serving.rows import Sampling

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 422, 429, 503)
}

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "A stream where it is asked for"}
}


def make_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(pieces: Pieces) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(deliver_here, pieces)

        service.start(deliver)
        yield
        for model in service.models.values():
            await run_in_threadpool(model.engine.close)
        if service.scoring:
            await run_in_threadpool(service.scoring.close)
        if service.writer:
            await run_in_threadpool(service.writer.close)
        if service.guard:
            await run_in_threadpool(service.guard.model.close)

    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="rlhf serve", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    errors.add_handlers(app)
    app.add_middleware(Gate, service=service)
    _add_openai(app, service)
    _add_votes(app, service)
    _add_state(app, service)
    add_watching(app, service)
    add_page(app)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(model) for model in service.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _described(service.model(name))

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        model = service.model(asked.model)
        turns = asked.turns(service.system)
        prompts = [await run_in_threadpool(model.encode_chat, turns)]
        answer = _answer(service, model, asked, prompts, [[turn.model_dump() for turn in turns]])
        return await _respond(service, request, answer, asked)

    @app.post("/v1/completions", responses=STREAMED)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        model = service.model(asked.model)
        prompts = await run_in_threadpool(lambda: [_ids(model, prompt) for prompt in asked.prompts()])
        texts = [prompt if isinstance(prompt, str) else model.text(prompt) for prompt in asked.prompts()]
        said = [[{"role": "prompt", "content": text}] for text in texts]
        return await _respond(service, request, _answer(service, model, asked, prompts, said), asked)

    @app.post("/predict", response_model=Prediction)
    async def predict(asked: PredictRequest, request: Request) -> Response:
        model = service.model(None)
        turns = [Turn(role="user", content=asked.text)]
        if service.system:
            turns.insert(0, Turn(role="system", content=service.system))
        ids = await run_in_threadpool(model.encode_chat, turns)
        sampling = Sampling(service.length(model, [ids], asked.max_tokens), asked.temperature)
        ask = Ask([ids], sampling, seed=asked.seed, strip=True)
        answer = Answer("chat", model, ask, [[turn.model_dump() for turn in turns]], asked.user)
        if not await at_once(service, request, answer):
            return Response(status_code=CLIENT_GONE)
        (piece,) = answer.pieces
        return JSONResponse(
            {
                "id": f"{answer.id}:0",
                "text": piece.text,
                "model": model.name,
                "finish_reason": piece.finish,
                **({"guard": answer.guarded[0]} if answer.guarded else {}),
                **{key: value for key, value in answer.usage().items() if key != "total_tokens"},
            }
        )


def _add_votes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/votes", response_model=Voted)
    async def vote(asked: VoteRequest) -> Response:
        if service.writer is None:
            raise ApiError(404, "this server keeps nothing (--store none)", "no_store")
        ids = [asked.first] if asked.second is None else [asked.first, asked.second]
        if not await run_in_threadpool(service.knows, ids):
            raise ApiError(404, "there is no such response, or it is kept no longer", "response_not_found")
        if not service.writer.add(asked.vote()):
            return errors.response(503, "the store takes no more; try again later", "store_full", retry_after=5)
        return JSONResponse({"kept": True})


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        down = [name for name, model in service.models.items() if not model.engine.up]
        state = "stopping" if service.stopping else "restarting" if down else "ready"
        served = {name: {"version": model.version, "digest": model.digest} for name, model in service.models.items()}
        return JSONResponse({"status": state, "models": served}, 200 if state == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(await service.metrics_text(), media_type="text/plain; version=0.0.4")


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "rlhf",
        "version": model.version,
        "digest": model.digest,
        "max_model_len": model.context,
    }


def _ids(model: ServedModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return model.encode_text(prompt)
    model.check_ids(prompt)
    return prompt


def _answer(
    service: Service,
    model: ServedModel,
    asked: ChatRequest | CompletionRequest,
    prompts: Sequence[list[int]],
    said: Sequence[Said],
) -> Answer:
    kind: Kind = "chat" if isinstance(asked, ChatRequest) else "completion"
    length = service.length(model, prompts, asked.longest)
    sampling = Sampling(length, asked.temperature, asked.top_p, asked.top)
    ask = Ask(prompts, sampling, asked.n, asked.seed, asked.stops, strip=kind == "chat")
    return Answer(kind, model, ask, said, asked.user)


async def _respond(
    service: Service, request: Request, answer: Answer, asked: ChatRequest | CompletionRequest
) -> Response:
    if not asked.stream:
        return await whole(service, request, answer)
    return await stream(service, answer, asked.stream_options is not None and asked.stream_options.include_usage)
