"""`make serve`: the chat handler of `transformers serve` for one model, behind a check of every request.

    python -m helpers.use.serve runs/qwen2vl-nutrition-detection-r4-joint-merged --port 8000

`transformers serve` itself opens files and addresses that a request names, answers 500 to what is no picture, and
takes any prompt. Here a request is one picture as a data URL, with the model's own prompt or none, and the answer is
greedy, whatever it says about drawing (`DRAWING`); anything else gets a 4xx with one sentence, and the server goes on.
"""

import asyncio
import base64
import binascii
import io
import json
import logging
import sys
import uuid
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.exceptions import HTTPException

from helpers import runs
from helpers.parameters import ParameterError
from helpers.use import load

MAX_BYTES = 20 * 2**20  # of a request
MAX_PIXELS = 50_000_000  # of a picture
MAX_TOKENS = 1024
DRAWING = ("temperature", "top_p", "top_k", "seed")
OPTIONS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "user", *DRAWING)
AS_IT_IS = [("n", 1), ("skip_special_tokens", False)]  # what is done anyway; the second is what vLLM has to be told
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF")  # MPO: a JPEG with more in it, as phones write it

log = logging.getLogger("uvicorn.error")


class Refused(Exception):
    """An answer that is no answer: the HTTP status, and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def error_answer(status: int, sentence: str) -> JSONResponse:
    """An error in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": sentence, "type": kind, "code": status}}, status)


async def read_body(request: Request) -> Any:
    """The request's JSON; what is longer than MAX_BYTES is refused before it is all in memory."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_BYTES:
            raise Refused(413, f"the request is larger than {MAX_BYTES // 2**20} MiB; send a smaller picture.")
    try:
        return json.loads(content)
    except ValueError:
        raise Refused(400, "the request's body is not JSON.") from None


def check_request(body: Any, name: str, prompt: str, tokens: int) -> dict[str, Any]:
    """The request that goes on to the model: one picture, its prompt, greedy. Raises Refused otherwise.

    `name` is the model's name here, `prompt` the question that it was trained with, `tokens` the limit of its answers
    where the request gives none.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the request is not a JSON object with model and messages.")
    if body.get("model", name) != name:
        raise Refused(404, f"the model {str(body['model'])[:200]!r} is not served here, {name!r} alone is.")
    for option, value in body.items():
        if option not in OPTIONS and value is not None and (option, value) not in AS_IT_IS:
            raise Refused(400, f"the option {option[:40]!r} is not known here; send some of {', '.join(OPTIONS)}.")
    if type(body.get("stream") or False) is not bool:
        raise Refused(400, f"stream is {str(body['stream'])[:40]!r}; send true or false.")
    url, text = _picture_and_text(body.get("messages"))
    if text not in ("", prompt):
        raise Refused(400, f"this model was trained with one prompt; send {prompt!r}, or the picture alone.")
    url = check_picture(url)
    limits = [body[given] for given in ("max_completion_tokens", "max_tokens") if body.get(given) is not None]
    limit, most = [*limits, tokens][0], max(MAX_TOKENS, tokens)
    if type(limit) is not int or not 1 <= limit <= most:
        raise Refused(400, f"max_tokens is {str(limit)[:40]!r}; send a whole number from 1 to {most}.")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": limit,
            "stream": bool(body.get("stream"))}


def _picture_and_text(messages: Any) -> tuple[str, str]:
    """(the picture's URL, the text or "") of the one user message that a request must be."""
    shape = "send one user message: one image_url, and the model's prompt as text or no text."
    try:
        (message,) = messages
        parts = message["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if message["role"] != "user" or len(urls) + len(texts) != len(parts) or len(texts) > 1:
            raise ValueError
        (url,) = urls
    except (TypeError, KeyError, ValueError):
        raise Refused(400, f"messages cannot be read; {shape}") from None
    text = texts[0] if texts else ""
    if not isinstance(url, str) or not isinstance(text, str):
        raise Refused(400, f"messages cannot be read; {shape}")
    return url, text.strip()


def check_picture(url: str) -> str:
    """The data URL of a whole picture, as the model's input takes it: a JPEG as it is, others as `open_upright`'s PNG.

    Raises Refused for anything else.
    """
    head, comma, written = url.partition(",")
    if not (head.lower().startswith("data:image/") and head.lower().endswith(";base64") and comma):
        raise Refused(400, "the picture must come as a data URL, data:image/jpeg;base64,…; addresses and files are not "
                           "opened.")
    try:
        content = base64.b64decode("".join(written.split()), validate=True)  # MIME's has lines
    except (binascii.Error, ValueError):
        raise Refused(400, "what follows data:image/…;base64, is not base64.") from None
    try:
        with Image.open(io.BytesIO(content)) as picture:  # reads the head alone
            kind, (width, height) = picture.format, picture.size
    except Image.DecompressionBombError:
        raise Refused(413, f"the picture has far more than {MAX_PIXELS:,} pixels; send a smaller one.") from None
    except Exception:  # Pillow's readers raise many kinds
        raise Refused(400, "the data URL holds no picture that can be read; send a JPEG, PNG, WebP or GIF.") from None
    if kind not in FORMATS:
        raise Refused(400, f"the picture is a {kind}; send a JPEG, PNG, WebP or GIF.")
    if width * height > MAX_PIXELS:
        raise Refused(413, f"the picture has {width} x {height} pixels; send {MAX_PIXELS:,} at most.")
    if max(width, height) > load.MAX_RATIO * min(width, height):
        raise Refused(400, f"the picture has {width} x {height} pixels; no side may be more than {load.MAX_RATIO} "
                           "times the other.")
    from transformers.image_utils import load_image_as_tensor

    if kind in ("JPEG", "MPO"):
        url = "data:image/jpeg;base64," + base64.b64encode(content).decode()
        try:
            load_image_as_tensor(url)
            return url
        except Exception:  # torchvision raises RuntimeError for all kinds of broken files
            pass
    still = io.BytesIO()
    try:
        load.open_upright(content).save(still, "PNG", compress_level=1)
    except ValueError:
        raise Refused(400, f"the picture cannot be decoded: the {kind} is broken or cut off.") from None
    return "data:image/png;base64," + base64.b64encode(still.getvalue()).decode()


def answer_errors(app: FastAPI) -> None:
    """Let everything that goes wrong in `app` be a status and one sentence, and the server live on."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error_answer(error.status, str(error))

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return error_answer(error.status_code, f"{error.detail}; there is POST /v1/chat/completions, GET /v1/models "
                                               "and GET /health.")

    @app.middleware("http")
    async def live_on(request: Request, call_next: Any) -> Response:
        try:
            return await call_next(request)
        except Exception:  # whatever a request has brought about ends that request alone
            log.exception("a request failed")
            return error_answer(500, "the server failed on this request, and its log says why; others go on.")


def build_app(model: str | Path) -> FastAPI:
    """The server of one merged model: /v1/chat/completions, /v1/models and /health. Loads the model."""
    name = Path(model).expanduser().resolve().name
    loaded, processor, prompt = load.load_model(model)
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
    from transformers.cli.serving.utils import GenerationState

    manager = ModelManager()
    manager.loaded_models[manager.process_model_name(name)] = TimedModel(loaded, -1, processor)  # stays for ever
    manager.force_model = name
    chat = ChatCompletionHandler(model_manager=manager, generation_state=GenerationState())
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Response:
        tokens = loaded.generation_config.max_new_tokens
        try:
            body = await read_body(request)
            asked = await asyncio.to_thread(check_request, body, name, prompt, tokens)  # decodes: not in the event loop
        except RecursionError:
            raise Refused(400, "the request's JSON is nested too deeply.") from None
        return await chat.handle_request(asked, f"chatcmpl-{uuid.uuid4().hex}")

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok"}

    answer_errors(app)
    return app


def main(arguments: list[str] | None = None) -> None:
    chosen = load.parse("serve", "An OpenAI-compatible server.", 8000, arguments)
    runs.quiet_libraries()
    try:
        model = chosen.model or load.newest()
        app = build_app(model)
    except ParameterError as error:
        sys.exit(str(error))
    import uvicorn

    print(f"{model} is served at http://{chosen.host}:{chosen.port}/v1 as {Path(model).resolve().name}", flush=True)
    uvicorn.run(app, host=chosen.host, port=chosen.port, log_level="warning")


if __name__ == "__main__":
    main()
