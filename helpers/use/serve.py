"""`make serve`: a server of one finished model that speaks OpenAI's protocol.

    python -m helpers.use.serve runs/qwen2vl-nutrition-detection-r4-joint-merged --port 8000

A request is one picture as a data URL, with the model's own prompt or none; the completion is the text that `predict`
generates for it, greedy whatever the request says about sampling (`SAMPLING`). Anything else gets a 4xx with one
sentence, and the server goes on. Files and addresses that a request names are not opened.
"""

import asyncio
import base64
import binascii
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL.Image import Image
from starlette.exceptions import HTTPException

from helpers import predict
from helpers.use import load

MAX_BYTES = 20 * 2**20  # of a request
MAX_PIXELS = 50_000_000  # of a picture
MAX_TOKENS = 1024
SAMPLING = ("temperature", "top_p", "top_k", "seed")
OPTIONS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "user", *SAMPLING)
NO_CHANGE = [("n", 1), ("skip_special_tokens", False)]  # what is done anyway; the second is what vLLM has to be told


def bad(sentence: str, status: int = 400) -> HTTPException:
    """What ends a request with a status and one sentence."""
    return HTTPException(status, sentence)


def error_body(status: int, sentence: str) -> JSONResponse:
    """An error in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": sentence, "type": kind, "code": status}}, status)


async def read_body(request: Request) -> Any:
    """The request's JSON; what is longer than MAX_BYTES is refused before it is all in memory."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_BYTES:
            raise bad(f"the request is larger than {MAX_BYTES // 2**20} MiB; send a smaller picture.", 413)
    try:
        return json.loads(content)
    except ValueError:
        raise bad("the request's body is not JSON.") from None


def check_request(body: Any, name: str, prompt: str, tokens: int) -> tuple[Image, int, bool]:
    """(the picture, the most tokens to generate, whether to stream) of a request. Raises `bad` otherwise.

    `name` is the model's name here, `prompt` the one that it was trained with, `tokens` the limit of its completions
    where the request gives none.
    """
    if not isinstance(body, dict):
        raise bad("the request is not a JSON object with model and messages.")
    if body.get("model", name) != name:
        raise bad(f"the model {str(body['model'])[:200]!r} is not served here, {name!r} alone is.", 404)
    for option, value in body.items():
        if option not in OPTIONS and value is not None and (option, value) not in NO_CHANGE:
            raise bad(f"the option {option[:40]!r} is not known here; send some of {', '.join(OPTIONS)}.")
    stream = body.get("stream") or False
    if type(stream) is not bool:
        raise bad(f"stream is {str(stream)[:40]!r}; send true or false.")
    limits = [body[given] for given in ("max_completion_tokens", "max_tokens") if body.get(given) is not None]
    limit, most = [*limits, tokens][0], max(MAX_TOKENS, tokens)
    if type(limit) is not int or not 1 <= limit <= most:
        raise bad(f"max_tokens is {str(limit)[:40]!r}; send a whole number from 1 to {most}.")
    url, text = picture_and_text(body.get("messages"))
    if text.strip() not in ("", prompt):
        raise bad(f"this model was trained with one prompt; send {prompt!r}, or the picture alone.")
    return read_picture(url), limit, stream


def picture_and_text(messages: Any) -> tuple[str, str]:
    """(the picture's URL, the text or "") of the one user message that a request must be."""
    try:
        (message,) = messages
        parts = message["content"]
        (url,) = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        (text,) = [part["text"] for part in parts if part["type"] == "text"] or [""]
        if message["role"] == "user" and len(parts) <= 2 and isinstance(url, str) and isinstance(text, str):
            return url, text
    except (TypeError, KeyError, ValueError):
        pass
    raise bad("messages cannot be read; send one user message: one image_url, and the model's prompt as text or no "
              "text.")


def read_picture(url: str) -> Image:
    """The picture in a data URL, upright and in RGB. Raises `bad` for anything else."""
    head, comma, written = url.partition(",")
    if not (head.lower().startswith("data:image/") and head.lower().endswith(";base64") and comma):
        raise bad("the picture must come as a data URL, data:image/jpeg;base64,…; addresses and files are not opened.")
    try:
        content = base64.b64decode("".join(written.split()), validate=True)  # MIME's has lines
    except (binascii.Error, ValueError):
        raise bad("what follows data:image/…;base64, is not base64.") from None
    try:
        return load.open_upright(content, MAX_PIXELS)
    except ValueError as error:
        raise bad(f"the picture: {error}.") from None


def completion(line: dict, name: str, stream: bool) -> Response:
    """A line of `predict` as OpenAI's clients read it; streamed, it comes in one piece."""
    message = {"role": "assistant", "content": line["text"]}
    choice = {"index": 0, "finish_reason": "stop" if line["stopped"] else "length",
              "delta" if stream else "message": message}
    body = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": f"chat.completion{'.chunk' if stream else ''}",
            "created": int(time.time()), "model": name, "choices": [choice]}
    if not stream:
        return JSONResponse(body)
    return Response(f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")


def build_app(model: str | Path) -> FastAPI:
    """The server of one merged model: /v1/chat/completions, /v1/models and /health. Loads the model."""
    name = Path(model).expanduser().resolve().name
    loaded, processor, prompt = load.load_model(model)
    tokens = loaded.generation_config.max_new_tokens
    one = ThreadPoolExecutor(1)  # one request after the other, and the event loop stays free
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            body = await read_body(request)
            picture, limit, stream = await asyncio.to_thread(check_request, body, name, prompt, tokens)
        except RecursionError:
            raise bad("the request's JSON is nested too deeply.") from None
        (line,) = await asyncio.get_running_loop().run_in_executor(
            one, predict.generate_lines, loaded, processor, [load.as_row("", picture)], prompt,
            {"do_sample": False, "max_new_tokens": limit})
        return completion(line, name, stream)

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok"}

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        paths = "" if error.detail.endswith(".") else ("; there is POST /v1/chat/completions, GET /v1/models and GET "
                                                       "/health.")
        return error_body(error.status_code, error.detail + paths)

    @app.exception_handler(Exception)  # uvicorn logs it, and goes on
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_body(500, "the server failed on this request, and its log says why; others go on.")

    return app


def main(arguments: list[str] | None = None) -> None:
    chosen = load.parse_port("serve", "A server that speaks OpenAI's protocol.", 8000, arguments)
    with load.one_sentence():
        model = chosen.model or load.newest()
        app = build_app(model)
    print(f"{model} is served at http://{chosen.host}:{chosen.port}/v1 as {Path(model).resolve().name}", flush=True)
    uvicorn.run(app, host=chosen.host, port=chosen.port, log_level="warning")


if __name__ == "__main__":
    main()
