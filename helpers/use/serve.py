"""`make serve`: a server of one finished model that speaks OpenAI's protocol.

    python -m helpers.use.serve runs/qwen2vl-nutrition-detection-r4-joint-merged --port 8000

A request is one picture as a data URL, with the model's own prompt or none; the completion is the text that `predict`
generates for it, greedy whatever the request says about sampling (`SAMPLING`), and its message has the `labels`,
`boxes` ([x0, y0, x1, y1] in 0-1) and `confidences` too. Anything else gets a 4xx with one sentence, and the server goes
on. Files and addresses that a request names are not opened. What has come while a batch
was generated is the next batch. After a SIGTERM no new request is taken, and those in work are completed.
"""

import asyncio
import base64
import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prometheus_client
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL.Image import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from helpers import predict
from helpers.use import load

KEY = "SERVE_API_KEY"  # the environment's: where it is set, requests need it
MAX_BYTES = 20 * 2**20  # of a request
MAX_SECONDS = 60  # that its body may take to come
MAX_PIXELS = 50_000_000  # of a picture
MAX_TOKENS = 1024
IN_WORK = 128  # requests at the same time; one more gets a 429
BATCH = 16  # pictures generated together, at most
WINDOW = 0.005  # seconds that a batch which is not full waits for more
READERS = 4  # pictures opened at the same time
SAMPLING = ("temperature", "top_p", "top_k", "seed")
OPTIONS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "user", *SAMPLING)
NO_CHANGE = [("n", 1), ("skip_special_tokens", False)]  # what is done anyway; the second is what vLLM has to be told
GONE = "the client has gone."
ADDRESSES = "POST /v1/chat/completions, GET /v1/models, GET /health and GET /metrics"

WORKING = prometheus_client.Gauge("serve_requests_in_work", "Requests without a reply yet")
SECONDS = prometheus_client.Histogram("serve_completion_seconds", "From a request to its completion",
                                      buckets=(0.1, 0.3, 1, 3, 10, 30, 100))
SIZES = prometheus_client.Histogram("serve_batch_size", "Pictures generated together", buckets=(1, 2, 4, 8, 16))
REFUSALS = prometheus_client.Counter("serve_refusals", "Requests without a completion", ["status"])


async def read_body(request: Request) -> bytearray:
    """The request's body; what is longer than MAX_BYTES is refused before it is all in memory."""
    content = bytearray()
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for piece in request.stream():
                content += piece
                if len(content) > MAX_BYTES:
                    raise HTTPException(413, f"the request is larger than {MAX_BYTES // 2**20} MiB; send a smaller "
                                             "picture.")
    except TimeoutError:
        raise HTTPException(408, f"the request's body was not there after {MAX_SECONDS} s.") from None
    except ClientDisconnect:
        raise HTTPException(499, GONE) from None
    return content


def check_request(body: Any, name: str, prompt: str, tokens: int) -> tuple[Image, int, bool]:
    """(the picture, the most tokens to generate, whether to stream) of a request. ValueError says what is wrong.

    `name` is the model's name here, `prompt` the one that it was trained with, `tokens` the limit of its completions
    where the request gives none.
    """
    if not isinstance(body, dict):
        raise ValueError("the request is not a JSON object with model and messages.")
    if body.get("model", name) != name:
        raise HTTPException(404, f"the model {str(body['model'])[:200]!r} is not served here, {name!r} alone is.")
    for option, value in body.items():
        if option not in OPTIONS and value is not None and (option, value) not in NO_CHANGE:
            raise ValueError(f"the option {option[:40]!r} is not known here; send some of {', '.join(OPTIONS)}.")
    stream = body.get("stream") or False
    if type(stream) is not bool:
        raise ValueError(f"stream is {str(stream)[:40]!r}; send true or false.")
    limits = [body[given] for given in ("max_completion_tokens", "max_tokens") if body.get(given) is not None]
    limit, most = [*limits, tokens][0], max(MAX_TOKENS, tokens)
    if type(limit) is not int or not 1 <= limit <= most:
        raise ValueError(f"max_tokens is {str(limit)[:40]!r}; send a whole number from 1 to {most}.")
    try:
        (message,) = body["messages"]
        parts = message["content"]
        (url,) = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        (text,) = [part["text"] for part in parts if part["type"] == "text"] or [""]
        if message["role"] != "user" or len(parts) > 2 or not (isinstance(url, str) and isinstance(text, str)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError("messages cannot be read; send one user message: one image_url, and the model's prompt as "
                         "text or no text.") from None
    if text.strip() not in ("", prompt):
        raise ValueError(f"this model was trained with one prompt; send {prompt!r}, or the picture alone.")
    return read_picture(url), limit, stream


def read_picture(url: str) -> Image:
    """The picture in a data URL, upright and in RGB. ValueError for anything else."""
    head, comma, written = url.partition(",")
    if not (head.lower().startswith("data:image/") and head.lower().endswith(";base64") and comma):
        raise ValueError("the picture must come as a data URL, data:image/jpeg;base64,…; addresses and files are not "
                         "opened.")
    try:
        content = base64.b64decode("".join(written.split()), validate=True)  # MIME's has lines
    except ValueError:
        raise ValueError("what follows data:image/…;base64, is not base64.") from None
    try:
        return load.open_upright(content, MAX_PIXELS)
    except ValueError as error:
        raise ValueError(f"the picture: {error}.") from None


def completion(line: dict, name: str, stream: bool) -> Response:
    """A line of `predict` as OpenAI's clients read it, boxes beside the text; streamed, it comes in one piece."""
    message = {"role": "assistant", "content": line["text"],
               **{name: line[name] for name in ("labels", "boxes", "confidences")}}
    choice = {"index": 0, "finish_reason": "stop" if line["stopped"] else "length",
              "delta" if stream else "message": message}
    body = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": f"chat.completion{'.chunk' if stream else ''}",
            "created": int(time.time()), "model": name, "choices": [choice]}
    if not stream:
        return JSONResponse(body)
    return Response(f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")


@dataclass
class Waiting:
    """A request that is ready for the model."""

    request: Request
    inputs: dict  # of `predict.model_inputs`, one row
    limit: int  # tokens
    line: asyncio.Future  # of `predict`


def generate(model: Any, processor: Any, batch: list[Waiting]) -> list[dict | Exception]:
    """Each request's line, or why there is none. All have one limit."""
    try:
        encoded = [one for waiting in batch for one in predict.encode_pictures(model, waiting.inputs)]
        return predict.complete(model, processor, encoded, {"do_sample": False, "max_new_tokens": batch[0].limit}, None)
    except Exception as error:
        if len(batch) == 1:
            return [error]
    half = len(batch) // 2  # memory has run out, or one of them is to blame
    return generate(model, processor, batch[:half]) + generate(model, processor, batch[half:])


async def work(waiting: asyncio.Queue[Waiting], model: Any, processor: Any) -> None:
    """For ever: generate what waits, in batches. What has come while one batch was generated is the next."""
    thread, loop = ThreadPoolExecutor(1), asyncio.get_running_loop()  # the event loop stays free
    while True:
        batch = [await waiting.get()]
        if waiting.qsize() < BATCH - 1:
            await asyncio.sleep(WINDOW)
        batch += [waiting.get_nowait() for _ in range(min(BATCH - 1, waiting.qsize()))]
        for one in batch:
            if await one.request.is_disconnected():
                one.line.set_exception(HTTPException(499, GONE))
        for limit in {one.limit for one in batch if not one.line.done()}:
            alike = [one for one in batch if one.limit == limit and not one.line.done()]
            SIZES.observe(len(alike))
            lines = await loop.run_in_executor(thread, generate, model, processor, alike)
            for one, line in zip(alike, lines, strict=True):
                if isinstance(line, Exception):
                    one.line.set_exception(line)
                else:
                    one.line.set_result(line)


def build_app(model: str | Path) -> FastAPI:
    """The server of one merged model: /v1/chat/completions, /v1/models, /health, /metrics. Loads the model."""
    name = Path(model).expanduser().resolve().name
    loaded, processor, prompt = load.load_model(model)
    if (passes := load.passes_of(model)) > 1:
        print(f"{name} was scored with passes={passes}; a request gets one pass, as every server gives it.")
    tokens, key = loaded.generation_config.max_new_tokens, os.environ.get(KEY)
    waiting: asyncio.Queue[Waiting] = asyncio.Queue()
    places = asyncio.Semaphore(IN_WORK)
    readers, lock = ThreadPoolExecutor(READERS), threading.Lock()

    def read(content: bytearray) -> tuple[dict, int, bool]:
        try:
            picture, limit, stream = check_request(json.loads(content), name, prompt, tokens)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise HTTPException(400, "the request's body is not JSON, or is nested too deeply.") from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        with lock:  # a tokenizer pads for one thread at a time
            return predict.model_inputs([load.as_row("", picture)], processor, prompt), limit, stream

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not secrets.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY.")

    @contextlib.asynccontextmanager
    async def working(app: FastAPI) -> AsyncIterator[None]:
        app.state.work = asyncio.create_task(work(waiting, loaded, processor))
        yield
        app.state.work.cancel()

    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None, lifespan=working)

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)])
    async def complete(request: Request) -> Response:
        start, loop = time.perf_counter(), asyncio.get_running_loop()
        if places.locked():
            raise HTTPException(429, f"{IN_WORK} requests are in work; try again in a moment.")
        async with places:
            with WORKING.track_inprogress():
                content = await read_body(request)
                inputs, limit, stream = await loop.run_in_executor(readers, read, content)
                waiting.put_nowait(own := Waiting(request, inputs, limit, loop.create_future()))
                line = await own.line
        SECONDS.observe(time.perf_counter() - start)
        return completion(line, name, stream)

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.get("/health")
    def health() -> dict:
        if app.state.work.done():
            raise HTTPException(503, "the server generates nothing any more, and its log says why; start it again.")
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    @app.exception_handler(Exception)  # uvicorn logs it, and goes on
    async def refused(_: Request, error: Exception) -> JSONResponse:
        """An error in the form that OpenAI's clients read."""
        status, said = 500, "the server failed on this request, and its log says why; others go on."
        if isinstance(error, HTTPException):
            status = error.status_code
            said = error.detail if error.detail.endswith(".") else f"{error.detail}; there is {ADDRESSES}."
        REFUSALS.labels(status).inc()
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": said, "type": kind, "code": status}}, status)

    return app


def main(arguments: list[str] | None = None) -> None:
    chosen = load.parse_port("serve", "A server that speaks OpenAI's protocol.", 8000, arguments)
    with load.one_sentence():
        model = chosen.model or load.newest()
        app = build_app(model)
    open_to_all = "" if os.environ.get(KEY) else f", to everybody who reaches the port ({KEY} is not set)"
    print(f"{model} is served at http://{chosen.host}:{chosen.port}/v1 as {Path(model).resolve().name}{open_to_all}",
          flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn hands it on when the last request is completed
    # a connection stays open longer than clients keep one, so that none is closed under a new request
    uvicorn.run(app, host=chosen.host, port=chosen.port, log_level="warning", timeout_keep_alive=75)


if __name__ == "__main__":
    main()
