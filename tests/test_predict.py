"""Generation: batches equal to one by one, lines that survive a kill, a confidence for each box."""

import json
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers import predict
from helpers.boxes import CATEGORIES
from helpers.messages import to_messages
from helpers.scenes import render_scene
from helpers.settings import TINY_BASE

PROMPT = "Detect the bounding box of the barcode."


@pytest.fixture(scope="module")
def processor():
    return Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=64 * 784)


@pytest.fixture(scope="module")
def vlm():
    return Qwen2VLForConditionalGeneration.from_pretrained(TINY_BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows():
    import io

    pictures = [Image.open(io.BytesIO(render_scene(0, i, "val").jpeg)).convert("RGB") for i in range(6)]
    empty = {"bbox": [], "category_id": [], "category_name": []}
    return Dataset.from_list([{"image_id": str(i), "image": p, "objects": empty} for i, p in enumerate(pictures)])


def ask(vlm, processor, rows, path, **options):
    options = {"batch_size": 4, "key": "k", "max_new_tokens": 48, "do_sample": False} | options
    return predict.predict(vlm, processor, rows, PROMPT, path, **options)


def test_batches_give_the_answers_of_one_by_one(vlm, processor, rows, tmp_path):
    together = ask(vlm, processor, rows, tmp_path / "together.jsonl", batch_size=4)
    alone = ask(vlm, processor, rows, tmp_path / "alone.jsonl", batch_size=1)
    assert [line["image_id"] for line in together] == rows["image_id"]
    assert [line["text"] for line in together] == [line["text"] for line in alone]
    for a, b in zip(together, alone, strict=True):
        assert a["confidences"] == pytest.approx(b["confidences"], abs=1e-3)
    assert predict.read_jsonl(tmp_path / "together.jsonl") == together
    assert not (tmp_path / "together.parts").exists()


def test_the_tower_may_look_at_a_few_pictures_at_a_time(vlm, processor, rows):
    batch = processor.image_processor([row["image"] for row in rows], return_tensors="pt")
    with torch.inference_mode():
        whole, few = (predict.look(vlm, batch["pixel_values"], batch["image_grid_thw"], at_once).pooler_output
                      for at_once in (6, 4))
    assert [len(tokens) for tokens in few] == (batch["image_grid_thw"].prod(-1) // 4).tolist()
    for a, b in zip(whole, few, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_sizes_are_those_of_the_pictures(rows):
    assert predict._sizes(rows) == [row["image"].size for row in rows]


def test_a_killed_call_goes_on(vlm, processor, rows, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    real, calls = predict.answer, []

    def dies_in_the_second_batch(*arguments):
        calls.append([row["image_id"] for row in arguments[2]])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(predict, "answer", dies_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        ask(vlm, processor, rows, path, batch_size=2)
    assert not path.exists()
    part = next((tmp_path / "p.parts").glob("*.jsonl"))
    part.write_text(part.read_text() + '{"image_id": "cut off')
    lines = ask(vlm, processor, rows, path, batch_size=2)
    asked = [image_id for call in calls[:1] + calls[2:] for image_id in call]
    assert sorted(asked) == rows["image_id"] == [line["image_id"] for line in lines]


def test_lines_of_other_inputs_are_not_taken_over(vlm, processor, rows, tmp_path):
    (tmp_path / "p.parts").mkdir()
    (tmp_path / "p.parts" / "other.0.jsonl").write_text(json.dumps({"image_id": "0", "text": "old"}) + "\n")
    assert ask(vlm, processor, rows.select([0]), tmp_path / "p.jsonl")[0]["text"] != "old"


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")])
def test_memory_that_runs_out_halves_the_batch(vlm, processor, rows, tmp_path, monkeypatch, capsys, error):
    real = predict.answer

    def only_one_fits(*arguments):
        if len(arguments[2]) > 1:
            raise error
        return real(*arguments)

    monkeypatch.setattr(predict, "answer", only_one_fits)
    assert len(ask(vlm, processor, rows.select([0, 1]), tmp_path / "p.jsonl", batch_size=4, max_new_tokens=4)) == 2
    assert "out of memory: going on with batches of 1" in capsys.readouterr().out


def test_what_was_looked_at_is_asked_again_and_nothing_is_done_twice(vlm, processor, rows, tmp_path, monkeypatch):
    whole = ask(vlm, processor, rows, tmp_path / "whole.jsonl")
    prepared, looked, real, prepare, look = [], [], predict.answer, predict.prepare, predict.look

    def two_fit(*arguments):
        if len(arguments[2]) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments)

    monkeypatch.setattr(predict, "answer", two_fit)
    monkeypatch.setattr(predict, "prepare", lambda few, **given: prepared.extend(row["image_id"] for row in few)
                        or prepare(few, **given))
    monkeypatch.setattr(predict, "look", lambda *given: looked.extend(given[2].tolist()) or look(*given))
    assert [line["text"] for line in ask(vlm, processor, rows, tmp_path / "halved.jsonl", batch_size=6)] == [
        line["text"] for line in whole]
    assert sorted(prepared) == rows["image_id"] and len(looked) == len(rows)


@pytest.mark.parametrize(("room", "expected"), [
    (3, ["looked at 2", "answered 2", "answered 2", "looked at 2", "answered 2"]),  # never 4 at once
    (5, ["looked at 4", "answered 3", "looked at 2", "answered 3"]),  # not 2 more while 4 wait
])
def test_a_look_that_does_not_fit_looks_at_fewer_or_waits(vlm, processor, rows, tmp_path, monkeypatch, capsys, room,
                                                          expected):
    events, waiting, answer, look = [], [], predict.answer, predict.look

    def little_room(*given):
        few = min(given[3], len(given[2]))
        if few + len(waiting) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        waiting.extend(given[2])
        events.append(f"looked at {few}")
        return look(*given)

    def makes_room(*given):
        events.append(f"answered {len(given[2])}")
        del waiting[: len(given[2])]
        return answer(*given)

    monkeypatch.setattr(predict, "look", little_room)
    monkeypatch.setattr(predict, "answer", makes_room)
    lines = ask(vlm, processor, rows, tmp_path / "p.jsonl", batch_size=6, max_new_tokens=4)
    assert [line["image_id"] for line in lines] == rows["image_id"]
    assert events == expected
    assert capsys.readouterr().out.count("out of memory") == 1


def test_a_process_that_opens_pictures_and_dies_is_named(vlm, processor, rows, tmp_path, monkeypatch):
    """On a GPU they are processes; here the DataLoader's words are raised where its pieces come in."""
    see, seen = predict.see, []

    def dies(*given):
        if seen:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.\nIt is possible that ...")
        seen.append(given)
        return see(*given)

    monkeypatch.setattr(predict, "see", dies)
    with pytest.raises(RuntimeError, match=r"pictures died \(DataLoader worker .pid 7.*/dev/shm.* after the 4 pic"):
        ask(vlm, processor, rows, tmp_path / "p.jsonl", batch_size=4, max_new_tokens=4)
    monkeypatch.undo()
    lines = ask(vlm, processor, rows, tmp_path / "p.jsonl", batch_size=4, max_new_tokens=4)
    assert [line["image_id"] for line in lines] == rows["image_id"]


def test_one_picture_that_does_not_fit_is_an_error(vlm, processor, rows, tmp_path, monkeypatch):
    def fails(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(predict, "look", fails)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ask(vlm, processor, rows, tmp_path / "p.jsonl")


def test_pictures_that_other_processes_opened_are_the_same(vlm, processor, rows, tmp_path, monkeypatch):
    sizes = [(700, 500), (500, 700), (90, 300), (700, 500), (1000, 80), (333, 333)]
    rows = rows.map(lambda row, i: {"image": row["image"].resize(sizes[i])}, with_indices=True)
    chats = [to_messages(row, PROMPT)["prompt"] for row in rows]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    whole = processor(images=list(rows["image"]), text=texts, padding=True, padding_side="left", return_tensors="pt")
    loader = DataLoader(rows, predict.AT_ONCE, num_workers=2,
                        collate_fn=partial(predict.prepare, processor=processor, prompt=PROMPT))
    pieces = list(loader)
    assert [image_id for piece in pieces for image_id in piece["image_id"]] == rows["image_id"]
    assert torch.equal(torch.cat([piece["pixel_values"] for piece in pieces]), whole.pop("pixel_values"))

    given, generate = {}, vlm.generate
    monkeypatch.setattr(vlm, "generate", lambda **batch: given.update(batch) or generate(**batch))
    predict.answer(vlm, processor, [one for piece in pieces for one in predict.see(vlm, piece)],
                   {"max_new_tokens": 1}, None)
    for name, tensor in whole.items():
        assert torch.equal(given[name], tensor) and given[name].dtype == tensor.dtype


def test_answers_are_the_same_with_other_processes(vlm, processor, rows, tmp_path, monkeypatch):
    alone = ask(vlm, processor, rows, tmp_path / "alone.jsonl")
    monkeypatch.setattr(predict, "DataLoader", lambda *given, **named: DataLoader(*given, **named | {"num_workers": 2}))
    assert ask(vlm, processor, rows, tmp_path / "helped.jsonl") == alone


def test_an_error_of_another_kind_is_not_taken_for_memory(vlm, processor, rows, tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(predict, "answer", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        ask(vlm, processor, rows, tmp_path / "p.jsonl")


def test_one_answer_as_a_line(processor):
    text = "<|object_ref_start|>barcode<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>(1,2"
    tokens = processor.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    half = [math.log(0.5)] * len(tokens)
    line = predict.line("a", tokens + [0, 0], half + [0.0, 0.0], processor.tokenizer)
    assert line["text"] == text and line["stopped"] and line["new_tokens"] == len(tokens)
    assert line["boxes"] == [[0.1, 0.2, 0.5, 0.6]] and line["labels"] == ["barcode"]
    assert line["confidences"] == [0.5] and len(line["rejected"]) == 1
    assert not predict.line("a", tokens[:-1], half[:-1], processor.tokenizer)["stopped"]


def test_confidence_counts_the_digits_of_its_own_box_alone(processor):
    one = "<|box_start|>(100,200),(500,600)<|box_end|>"
    pieces = processor.tokenizer.encode(one, add_special_tokens=False)
    sure, unsure = [0.0] * len(pieces), [math.log(0.25)] * len(pieces)
    line = predict.line("a", pieces * 2, sure + unsure, processor.tokenizer)
    assert line["confidences"] == [1.0, 0.25]


def test_constrained_answers_parse_and_batches_stay_equal(vlm, processor, rows, tmp_path):
    together = ask(vlm, processor, rows, tmp_path / "together.jsonl", names=CATEGORIES, max_new_tokens=80)
    alone = ask(vlm, processor, rows, tmp_path / "alone.jsonl", names=CATEGORIES, max_new_tokens=80, batch_size=1)
    assert all(line["stopped"] and not line["rejected"] for line in together)
    assert [line["text"] for line in together] == [line["text"] for line in alone]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_are_generated_without_the_kernel_of_cudnn(vlm, processor, rows, monkeypatch, attention):
    seen, real = [], vlm.generate
    monkeypatch.setattr(vlm, "generate", lambda **given: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
                        or real(**given))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    vlm.set_attn_implementation(attention)
    (line,) = predict.generate_lines(vlm, processor, [rows[0]], PROMPT, {"max_new_tokens": 4, "do_sample": False})
    vlm.set_attn_implementation("sdpa")
    assert line["new_tokens"] and seen == [False] and torch.backends.cuda.cudnn_sdp_enabled() == before
