"""The server: real requests of OpenAI's client over the loopback; bad ones get one sentence, and it lives on."""

import base64
import io
import json
import subprocess
import sys
import urllib.request

import finished_model
import httpx
import openai
import pytest
from PIL import Image

from helpers import predict
from helpers.messages import NO_TABLE, parse_text, target_text
from helpers.topics.serving import served
from helpers.use import load, serve


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return finished_model.make(tmp_path_factory.mktemp("runs") / "x-merged")


@pytest.fixture(scope="module")
def address(model):
    with served(sys.executable, "-m", "helpers.use.serve", str(model)) as url:
        yield url


def data_url(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def png(size, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, kind)
    return file.getvalue()


def question(url: str, text: str | None = None) -> list:
    words = [{"type": "text", "text": text}] if text is not None else []
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, *words]}]


def ask(address, messages, model="x-merged", **options) -> str:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    return client.chat.completions.create(model=model, messages=messages, **options).choices[0].message.content


def test_the_boxes_are_those_of_predict_with_and_without_prompt_and_other_options(address, model):
    loaded, processor, prompt = load.load_model(model)
    found = 0
    for content in [finished_model.scene(i) for i in range(4)] + [finished_model.turned(finished_model.scene(0))]:
        row = load.as_row("1", load.open_upright(content))
        (line,) = predict.generate_lines(loaded, processor, [row], prompt,
                                         {"max_new_tokens": load.MAX_NEW_TOKENS, "do_sample": False})
        for text, options in ((None, {}), (prompt, {"temperature": 0.9, "seed": 3, "max_tokens": 128,
                                                    "extra_body": {"skip_special_tokens": False}})):
            answer = ask(address, question(data_url(content), text), **options)
            assert parse_text(answer).boxes_xyxy_unit.tolist() == line["boxes"]
            assert answer == line["text"]
        found += len(line["boxes"])
    assert found  # or nothing was compared


def test_base64_with_line_breaks_and_options_that_ask_for_nothing_else_are_taken(address):
    plain = data_url(finished_model.scene(0))
    lines = "DATA:image/jpeg;BASE64,\r\n" + base64.encodebytes(finished_model.scene(0)).decode().replace("\n", "\r\n")
    more = {"n": 1, "extra_body": {"stop": None, "tools": None}}
    assert ask(address, question(lines), **more) == ask(address, question(plain))




def test_the_longest_answer_is_the_runs_own_also_where_it_is_longer_than_a_request_may_ask():
    for tokens in (48, 2000):
        assert serve.check_request({"messages": question(GOOD)}, "x", "", tokens)[1] == tokens
    assert serve.check_request({"messages": question(GOOD), "max_tokens": 7}, "x", "", 48)[1] == 7



def test_a_streamed_answer_is_the_same(address):
    messages = question(data_url(finished_model.scene(0)))
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    pieces = [piece.choices[0].delta.content or "" for piece
              in client.chat.completions.create(model="x-merged", messages=messages, stream=True)]
    assert "".join(pieces) == ask(address, messages)


def test_one_model_is_listed_and_no_other_path_is_there(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["x-merged"]
    for path in ("/load_model", "/reset", "/v1/completions", "/docs"):
        request = urllib.request.Request(address + path, data=b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 404 and "/v1/chat/completions" in refused.value.read().decode()


GOOD = data_url(finished_model.scene(0))
BAD = {
    "not a picture": (question(data_url(b"hello")), {}, 400, "no picture"),
    "cut off": (question(data_url(finished_model.scene(0)[:2000])), {}, 400, "image file is truncated"),
    "not base64": (question("data:image/jpeg;base64,@@@"), {}, 400, "not base64"),
    "a file of the server": (question("/etc/hostname"), {}, 400, "not opened"),
    "an address": (question("http://127.0.0.1:1/x.jpg"), {}, 400, "not opened"),
    "too many pixels": (question(data_url(png((7200, 7200)))), {}, 400, "7200 x 7200 pixels"),
    "a strip": (question(data_url(png((2010, 10)))), {}, 400, "200 times"),
    "too long": (question("data:image/png;base64," + "A" * serve.MAX_BYTES), {}, 413, "larger than 20 MiB"),
    "another model": (question(GOOD), {"model": "gpt-4o"}, 404, "'x-merged' alone"),
    "another prompt": (question(GOOD, "What is it?"), {}, 400, finished_model.PROMPT),
    "two pictures": ([{"role": "user", "content": question(GOOD)[0]["content"] * 2}], {}, 400, "one image_url"),
    "no picture": ([{"role": "user", "content": "hello"}], {}, 400, "one image_url"),
    "a conversation": (question(GOOD) * 2, {}, 400, "one user message"),
    "a long answer": (question(GOOD), {"max_tokens": 10**9}, 400, "from 1 to 1024"),
    "no answer": (question(GOOD), {"max_tokens": 0}, 400, "from 1 to 1024"),
    "two answers": (question(GOOD), {"n": 2}, 400, "the option 'n' is not known here"),
    "tools": (question(GOOD), {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "option 'tools'"),
    "a form": (question(GOOD), {"response_format": {"type": "json_object"}}, 400, "option 'response_format'"),
    "an end": (question(GOOD), {"stop": ["<|box_end|>"]}, 400, "option 'stop'"),
    "probabilities": (question(GOOD), {"logprobs": True}, 400, "option 'logprobs'"),
    "usage": (question(GOOD), {"stream": True, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    "half a stream": (question(GOOD), {"extra_body": {"stream": "yes"}}, 400, "send true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_one_sentence_and_the_server_lives_on(address, name):
    messages, options, status, said = BAD[name]
    with pytest.raises(openai.APIStatusError) as refused:
        ask(address, messages, **options)
    assert refused.value.status_code == status
    assert said in refused.value.message and "\n" not in refused.value.message
    assert httpx.get(f"{address}/health").is_success


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b"{}", b'{"messages": 3}', b'{"messages": [{"role": 1}]}',
                                  b"[" * 10**5, b'{"messages": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
                                  b'{"model": ' + b"[" * 980 + b"]" * 980 + b"}", b'{"model": "\\ud800"}'])
def test_a_body_that_makes_no_sense_is_the_clients_fault(address, body):
    request = urllib.request.Request(f"{address}/v1/chat/completions", data=body, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code in (400, 404)
    assert json.loads(refused.value.read())["error"]["type"] == "invalid_request_error"


def test_a_failure_inside_ends_one_request_alone(model, monkeypatch):
    from starlette.testclient import TestClient
    def fails(*_):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(predict, "generate_lines", fails)
    with TestClient(serve.build_app(model), raise_server_exceptions=False) as client:
        answer = client.post("/v1/chat/completions", json={"messages": question(GOOD)})
        assert answer.status_code == 500 and "this request" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 200


def test_a_model_that_cannot_be_served_ends_the_command_with_a_sentence(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    command = [sys.executable, "-m", "helpers.use.serve", str(tmp_path), "--port", "48000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "holds an adapter" in done.stderr


def test_an_answer_without_its_special_tokens_is_read_the_same():
    """Other servers strip them: vLLM does, unless a request says skip_special_tokens: false."""
    objects = {"bbox": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.9, 0.8], [0.6, 0.6, 0.7, 0.7]],
               "category_name": ["nutrition-table", "nutrition-table-small", "nutrition-table"]}
    whole = target_text(objects)
    bare = whole
    for token in ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"):
        bare = bare.replace(token, "")
    assert "<" not in bare
    assert parse_text(bare).boxes_xyxy_unit.tolist() == parse_text(whole).boxes_xyxy_unit.tolist()
    assert parse_text(bare).labels == parse_text(whole).labels and len(parse_text(bare).labels) == 3
    assert parse_text(NO_TABLE).empty_answer
