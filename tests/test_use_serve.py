"""The server: real requests of OpenAI's client over the loopback; bad ones get one sentence, and it lives on."""

import asyncio
import base64
import io
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import finished_model
import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image
from starlette.testclient import TestClient

from helpers import parity, predict
from helpers.topics.serving import served
from helpers.use import load, serve


@pytest.fixture(scope="module")
def address(model):
    with served(sys.executable, "-m", "helpers.use.serve", str(model)) as url:
        yield url


def data_url(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def strip(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


def request_for(url: str, text: str | None = None) -> list:
    words = [{"type": "text", "text": text}] if text is not None else []
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, *words]}]


def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def message_of(address, messages, model="x-merged", **options):
    return client(address).chat.completions.create(model=model, messages=messages, **options).choices[0].message


def text_of(address, messages, **options) -> str:
    return message_of(address, messages, **options).content


def test_the_text_is_that_of_predict_with_and_without_prompt_and_other_options(address, model):
    loaded, processor, prompt = load.load_model(model)
    boxes = 0
    for content in [finished_model.scene(0), finished_model.scene(1), finished_model.turned(finished_model.scene(0))]:
        row = load.as_row("1", load.open_upright(content))
        (line,) = predict.generate_lines(loaded, processor, [row], prompt, {"do_sample": False})
        boxes += len(line["boxes"])
        for text, options in ((None, {}), (prompt, {"temperature": 0.9, "seed": 3, "max_tokens": 128, "n": 1,
                                                    "extra_body": {"skip_special_tokens": False, "stop": None}})):
            message = message_of(address, request_for(data_url(content), text), **options)
            assert message.content == line["text"] and message.boxes == line["boxes"]
            assert message.labels == line["labels"] and message.confidences == line["confidences"]
        in_lines = base64.encodebytes(content).decode().replace("\n", "\r\n")  # as MIME has it
        assert text_of(address, request_for("DATA:image/jpeg;BASE64,\r\n" + in_lines)) == line["text"]
        pieces = client(address).chat.completions.create(model="x-merged", messages=request_for(data_url(content)),
                                                         stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == line["text"]
    assert boxes  # or nothing was compared


@pytest.mark.parametrize(("given", "own", "limit"), [({}, 48, 48), ({}, 2000, 2000), ({"max_tokens": 7}, 48, 7)])
def test_the_token_limit_is_the_runs_own_also_where_it_is_longer_than_a_request_may_give(given, own, limit):
    assert serve.check_request({"messages": request_for(GOOD)} | given, "x", "", own)[1] == limit


def test_one_model_is_listed_and_no_other_path_is_there(address):
    assert [model.id for model in client(address).models.list()] == ["x-merged"]
    for path in ("/load_model", "/reset", "/v1/completions", "/docs"):
        refused = httpx.post(address + path, json={})
        assert refused.status_code == 404 and "/v1/chat/completions" in refused.json()["error"]["message"]


GOOD = data_url(finished_model.scene(0))
BAD = {
    "not a picture": (request_for(data_url(b"hello")), {}, 400, "no picture"),
    "cut off": (request_for(data_url(finished_model.scene(0)[:2000])), {}, 400, "image file is truncated"),
    "not base64": (request_for("data:image/jpeg;base64,@@@"), {}, 400, "not base64"),
    "a file of the server": (request_for("/etc/hostname"), {}, 400, "not opened"),
    "an address": (request_for("http://127.0.0.1:1/x.jpg"), {}, 400, "not opened"),
    "too many pixels": (request_for(data_url(strip(7200, 7200))), {}, 400, "7200 x 7200 pixels"),
    "a strip": (request_for(data_url(strip(2010, 10))), {}, 400, "200 times"),
    "too long": (request_for("data:image/png;base64," + "A" * serve.MAX_BYTES), {}, 413, "larger than 20 MiB"),
    "another model": (request_for(GOOD), {"model": "gpt-4o"}, 404, "'x-merged' alone"),
    "another prompt": (request_for(GOOD, "What is it?"), {}, 400, finished_model.PROMPT),
    "two pictures": ([{"role": "user", "content": request_for(GOOD)[0]["content"] * 2}], {}, 400, "one image_url"),
    "no picture": ([{"role": "user", "content": "hello"}], {}, 400, "one image_url"),
    "a conversation": (request_for(GOOD) * 2, {}, 400, "one user message"),
    "a long completion": (request_for(GOOD), {"max_tokens": 10**9}, 400, "from 1 to 1024"),
    "two completions": (request_for(GOOD), {"n": 2}, 400, "the option 'n' is not known here"),
    "usage": (request_for(GOOD), {"stream": True, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    "half a stream": (request_for(GOOD), {"extra_body": {"stream": "yes"}}, 400, "send true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_one_sentence_and_the_server_lives_on(address, name):
    messages, options, status, said = BAD[name]
    with pytest.raises(openai.APIStatusError) as refused:
        text_of(address, messages, **options)
    assert refused.value.status_code == status
    assert said in refused.value.message and "\n" not in refused.value.message
    assert httpx.get(f"{address}/health").is_success


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b"{}", b'{"messages": 3}', b'{"messages": [{"role": 1}]}',
                                  b"[" * 10**5, b'{"messages": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
                                  b'{"model": ' + b"[" * 980 + b"]" * 980 + b"}", b'{"model": "\\ud800"}'])
def test_a_body_that_makes_no_sense_is_the_clients_fault(address, body):
    refused = httpx.post(f"{address}/v1/chat/completions", content=body)
    assert refused.status_code in (400, 404) and refused.json()["error"]["type"] == "invalid_request_error"


def test_a_batch_that_fails_is_divided_and_a_failure_inside_ends_one_request_alone(model, monkeypatch):
    real = predict.complete

    def fails_with_more_than(most, given):
        if len(given[2]) > most:
            raise RuntimeError("CUDA error: out of memory")
        return real(*given)

    def post(_):
        return app.post("/v1/chat/completions", json={"messages": request_for(GOOD)})

    with TestClient(serve.build_app(model), raise_server_exceptions=False) as app, ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(predict, "complete", lambda *given: fails_with_more_than(2, given))
        assert [reply.status_code for reply in pool.map(post, range(8))] == [200] * 8
        monkeypatch.setattr(predict, "complete", lambda *given: fails_with_more_than(0, given))
        reply = post(0)
        assert reply.status_code == 500 and "this request" in reply.json()["error"]["message"]
        assert app.get("/health").status_code == 200
        monkeypatch.setattr(predict, "complete", real)
        assert post(0).status_code == 200
        app.app.state.work.cancel()
        assert app.get("/health").status_code == 503


def test_the_key_the_places_and_the_patience_are_bounds(model, monkeypatch):
    monkeypatch.setenv(serve.KEY, "secret")
    monkeypatch.setattr(serve, "IN_WORK", 0)
    monkeypatch.setattr(serve, "MAX_SECONDS", 0.01)
    app = serve.build_app(model)
    with TestClient(app) as caller:
        for given in ({}, {"authorization": "Bearer other"}, {"authorization": "Bearer s\u00e9cret".encode()}):
            refused = caller.post("/v1/chat/completions", headers=given)
            assert refused.status_code == 401 and "Bearer KEY" in refused.json()["error"]["message"]
            assert caller.get("/v1/models", headers=given).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert caller.get("/v1/models", headers=key).status_code == caller.get("/health").status_code == 200
        assert caller.post("/v1/chat/completions", headers=key).status_code == 429
        assert 'serve_refusals_total{status="429"} 1.0' in caller.get("/metrics").text

    async def slow():
        yield b"{"
        await asyncio.sleep(60)

    async def send():
        monkeypatch.setattr(serve, "IN_WORK", 1)
        app = serve.build_app(model)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", headers=key) as caller:
            return await caller.post("/v1/chat/completions", content=slow())

    assert asyncio.run(send()).status_code == 408


def test_a_caller_that_has_gone_costs_nothing(address):
    body, before = body_of(request_for(GOOD)), metric(address, "serve_batch_size_sum")
    with socket.create_connection(address.removeprefix("http://").split(":")) as leaves:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        leaves.sendall(head.encode() + body)
    deadline = time.monotonic() + 60
    while not metric(address, 'serve_refusals_total{status="499"}'):
        assert time.monotonic() < deadline
    assert metric(address, "serve_batch_size_sum") == before


# --- many callers


def body_of(messages, **options) -> bytes:
    return json.dumps({"model": "x-merged", "messages": messages} | options).encode()


def metric(address, name) -> float:
    """The sum of a metric over all labels, or over those in the name."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split()[0].startswith(name) and line[0] != "#")


async def call(address, bodies, callers, until) -> list[tuple[int, int, str, float]]:
    """(number in `bodies`, status, what it says, seconds) of all requests that `callers` at the same time send."""
    replies, numbers = [], itertools.count()

    async def one_caller() -> None:
        while until(number := next(numbers)):
            start = time.perf_counter()
            reply = await client.post(f"{address}/v1/chat/completions", content=bodies[number % len(bodies)])
            said = reply.json()
            text = said["choices"][0]["message"]["content"] if reply.is_success else said["error"]["message"]
            replies.append((number % len(bodies), reply.status_code, text, time.perf_counter() - start))

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(one_caller() for _ in range(callers)))
    return replies


@pytest.mark.slow
def test_64_callers_lose_nothing_and_memory_stays(address):
    """LOAD seconds long (10); prints what a person wants to know of it."""
    seconds = float(os.environ.get("LOAD", 10))
    good = [body_of(request_for(data_url(finished_model.scene(number)))) for number in range(16)]
    alone = {number: text for number, _, text, _ in asyncio.run(call(address, good, 1, lambda n: n < 16))}
    bad = {body_of(request_for(data_url(b"hello"))): (400, "no picture"), b"no json": (400, "not JSON"),
           body_of(request_for(GOOD), model="gpt-4o"): (404, "alone is"),
           body_of(request_for(GOOD), max_tokens=0): (400, "from 1 to")}
    expected = [(200, "<|box_start|>")] * 16 + [*bad.values()]
    asyncio.run(call(address, [*good, *bad], 64, lambda n: n < 256))  # warm
    names = ("process_resident_memory_bytes", "serve_completion_seconds_count", "serve_refusals_total",
             "serve_batch_size_sum", "serve_batch_size_count")
    before, start = np.array([metric(address, name) for name in names]), time.monotonic()
    replies = asyncio.run(call(address, [*good, *bad], 64, lambda _: time.monotonic() < start + seconds))
    took, after = time.monotonic() - start, np.array([metric(address, name) for name in names])
    _, completed, refused, pictures, batches = after - before
    assert all(status == expected[n][0] and expected[n][1] in text for n, status, text, _ in replies)
    waits = [wait for _, status, _, wait in replies if status == 200]
    assert (completed, completed + refused) == (len(waits), len(replies))
    same = np.mean([text == alone[number] for number, status, text, _ in replies if status == 200])
    print(f"\n{len(waits) / took:.1f} pictures/s, wait p50 {np.percentile(waits, 50):.2f} s, p95 "
          f"{np.percentile(waits, 95):.2f} s; {pictures / batches:.1f} a batch, memory x {after[0] / before[0]:.3f}")
    assert pictures / batches > 8 and same > 0.9 and after[0] < 1.1 * before[0]


def test_sigterm_completes_what_is_in_work_and_takes_nothing_new(address):
    """The last test here: it ends the server of the others."""
    (server,) = (child for child in psutil.Process().children() if address.rpartition(":")[2] in child.cmdline())
    with ThreadPoolExecutor(1) as pool:
        bodies = [body_of(request_for(GOOD))]
        replies = pool.submit(lambda: asyncio.run(call(address, bodies, 24, lambda number: number < 24)))
        while metric(address, "serve_requests_in_work") < 24:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert [status for _, status, _, _ in replies.result()] == [200] * 24
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_a_model_of_several_passes_is_said_to_get_one_here(model, tmp_path, capsys):
    twice = shutil.copytree(model, tmp_path / "often-merged")
    parity.note_use(twice, passes=3)
    serve.build_app(twice)
    assert "often-merged was scored with passes=3; a request gets one pass" in capsys.readouterr().out
