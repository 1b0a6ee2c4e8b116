"""Generation: batches equal to one by one, lines that survive a kill, a confidence a box, constrained decoding."""

import io
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from small_training import load_tiny
from torch.utils.data import DataLoader
from transformers import PrefixConstrainedLogitsProcessor, Qwen2VLConfig, Qwen2VLProcessor

from helpers import predict
from helpers.boxes import CATEGORIES
from helpers.dev.random_7b import PUBLISHED
from helpers.messages import END_OF_TURN, NO_TABLE, longest_unit, parse_text, target_text, to_messages
from helpers.scenes import render_scene
from helpers.settings import TINY_BASE

PROMPT = "Detect the bounding box of the barcode."


@pytest.fixture(scope="module")
def processor():
    return Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=64 * 784)


@pytest.fixture(scope="module")
def vlm():
    return load_tiny(dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    pictures = [Image.open(io.BytesIO(render_scene(0, i, "val").jpeg)).convert("RGB") for i in range(6)]
    empty = {"bbox": [], "category_id": [], "category_name": []}
    return Dataset.from_list([{"image_id": str(i), "image": p, "width": p.width, "height": p.height, "objects": empty}
                              for i, p in enumerate(pictures)])


def run(vlm, processor, rows, path, **options):
    options = {"batch_size": 4, "key": "k", "max_new_tokens": 48, "do_sample": False} | options
    return predict.predict(vlm, processor, rows, PROMPT, path, **options)


def test_batches_give_the_completions_of_one_by_one(vlm, processor, rows, tmp_path):
    together = run(vlm, processor, rows, tmp_path / "together.jsonl", batch_size=4)
    alone = run(vlm, processor, rows, tmp_path / "alone.jsonl", batch_size=1)
    assert [line["image_id"] for line in together] == rows["image_id"]
    assert [line["text"] for line in together] == [line["text"] for line in alone]
    for a, b in zip(together, alone, strict=True):
        assert a["confidences"] == pytest.approx(b["confidences"], abs=1e-3)
    assert predict.read_jsonl(tmp_path / "together.jsonl") == together
    assert not (tmp_path / "together.parts").exists()


def test_a_killed_call_goes_on(vlm, processor, rows, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    real, calls = predict.complete, []

    def dies_in_the_second_batch(*arguments):
        calls.append([row["image_id"] for row in arguments[2]])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(predict, "complete", dies_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        run(vlm, processor, rows, path, batch_size=2)
    assert not path.exists()
    part = next((tmp_path / "p.parts").glob("*.jsonl"))
    part.write_text(part.read_text() + '{"image_id": "cut off')
    lines = run(vlm, processor, rows, path, batch_size=2)
    generated = [image_id for call in calls[:1] + calls[2:] for image_id in call]
    assert sorted(generated) == rows["image_id"] == [line["image_id"] for line in lines]


def test_lines_of_other_inputs_are_not_taken_over(vlm, processor, rows, tmp_path):
    (tmp_path / "p.parts").mkdir()
    (tmp_path / "p.parts" / "other.0.jsonl").write_text(json.dumps({"image_id": "0", "text": "old"}) + "\n")
    assert run(vlm, processor, rows.select([0]), tmp_path / "p.jsonl")[0]["text"] != "old"


@pytest.mark.parametrize("error, room, sizes", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory."), 3, [3, 3]),  # the first 4 are too many
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 5, [3, 3]),  # not 2 more beside 4
    (torch.cuda.OutOfMemoryError("CUDA out of memory."), 1, [1] * 6),
])
def test_memory_that_runs_out_halves_the_batch(error, room, sizes, vlm, processor, rows, tmp_path, monkeypatch, capsys):
    """Encoded pictures take the room until they are completed."""
    whole = run(vlm, processor, rows, tmp_path / "whole.jsonl", batch_size=6)
    completed, waiting, complete, encode = [], [], predict.complete, predict.encode_pictures

    def little_room(vlm, batch):
        if len(batch["image_id"]) + len(waiting) > room:
            waiting.clear()
            raise error
        waiting.extend(batch["image_id"])
        return encode(vlm, batch)

    def makes_room(*given):
        completed.append(len(given[2]))
        del waiting[: len(given[2])]
        return complete(*given)

    monkeypatch.setattr(predict, "encode_pictures", little_room)
    monkeypatch.setattr(predict, "complete", makes_room)
    lines = run(vlm, processor, rows, tmp_path / "p.jsonl", batch_size=6)
    assert [line["text"] for line in lines] == [line["text"] for line in whole] and completed == sizes
    assert f"out of memory: going on with batches of {sizes[0]}" in capsys.readouterr().out


def test_an_error_that_is_not_of_memory_ends_the_call(vlm, processor, rows, tmp_path, monkeypatch):
    def dies(*given):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")

    monkeypatch.setattr(predict, "complete", dies)
    with pytest.raises(RuntimeError, match="Bus error"):
        run(vlm, processor, rows, tmp_path / "p.jsonl")


def test_a_batch_is_the_processors_own(vlm, processor, rows, monkeypatch):
    sizes = [(700, 500), (500, 700), (90, 300), (700, 500), (1000, 80), (333, 333)]
    rows = [row | {"image": row["image"].resize(size)} for row, size in zip(rows, sizes, strict=True)]
    chats = [to_messages(row, PROMPT)["prompt"] for row in rows]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    pictures = [row["image"] for row in rows]
    whole = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    given, generate = {}, vlm.generate
    monkeypatch.setattr(vlm, "generate", lambda **batch: given.update(batch) or generate(**batch))
    predict.generate_lines(vlm, processor, rows, PROMPT, {"max_new_tokens": 1})
    features = vlm.get_image_features(whole.pop("pixel_values"), whole["image_grid_thw"]).pooler_output
    for mine, own in zip(given["mm_encoder_outputs"]["image"].pooler_output, features, strict=True):  # four at a time
        torch.testing.assert_close(mine, own, atol=1e-4, rtol=1e-4)
    for name, tensor in whole.items():
        assert torch.equal(given[name], tensor) and given[name].dtype == tensor.dtype


def test_predictions_are_the_same_with_other_processes(vlm, processor, rows, tmp_path, monkeypatch):
    alone = run(vlm, processor, rows, tmp_path / "alone.jsonl")
    monkeypatch.setattr(predict, "DataLoader", lambda *given, **named: DataLoader(*given, **named | {"num_workers": 2}))
    assert run(vlm, processor, rows, tmp_path / "helped.jsonl") == alone


def test_one_completion_as_a_line(processor):
    text = "<|object_ref_start|>barcode<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>(1,2"
    tokens = processor.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    half = [math.log(0.5)] * len(tokens)
    line = predict.line("a", tokens + [0, 0], half + [0.0, 0.0], processor.tokenizer)
    assert line["text"] == text and line["stopped"] and line["new_tokens"] == len(tokens)
    assert line["boxes"] == [[0.1, 0.2, 0.5, 0.6]] and line["labels"] == ["barcode"]
    assert line["confidences"] == [round(0.5 * 0.5**0.25, 4)] and len(line["rejected"]) == 1
    assert not predict.line("a", tokens[:-1], half[:-1], processor.tokenizer)["stopped"]
    unsure = [math.log(0.25)] * len(tokens)  # of each box its own tokens count alone
    below = processor.tokenizer.encode(text[:-4].replace("200", "700").replace("600", "900"), add_special_tokens=False)
    again = processor.tokenizer.encode(text[:-4].replace("100", "123"), add_special_tokens=False)
    more = predict.line("a", tokens[:-5] + again + below, half[:-5] + half[: len(again)] + unsure[: len(below)],
                        processor.tokenizer)
    assert more["confidences"] == [0.4204, 0.1768] and more["text"].count("<|box_end|>") == 3  # one drawn again
    assert more["boxes"] == [[0.1, 0.2, 0.5, 0.6], [0.1, 0.7, 0.5, 0.9]] and more["labels"] == ["barcode"] * 2


def test_constrained_completions_parse_and_batches_stay_equal(vlm, processor, rows, tmp_path):
    together = run(vlm, processor, rows, tmp_path / "together.jsonl", names=CATEGORIES, max_new_tokens=80)
    alone = run(vlm, processor, rows, tmp_path / "alone.jsonl", names=CATEGORIES, max_new_tokens=80, batch_size=1)
    assert all(line["stopped"] and not line["rejected"] for line in together)
    assert [line["text"] for line in together] == [line["text"] for line in alone]


def test_completions_are_generated_without_the_kernel_of_cudnn(vlm, processor, rows, monkeypatch):
    enabled, real, before = [], vlm.generate, torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(vlm, "generate", lambda **given: enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
                        or real(**given))
    predict.generate_lines(vlm, processor, [rows[0]], PROMPT, {"max_new_tokens": 1, "do_sample": False})
    assert enabled == [False] and torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def walk(allowed, tokens):
    """Whether these tokens may be generated, one after the other, behind a prompt of one token."""
    return all(token in allowed(0, torch.tensor([7, *tokens[:place]])) for place, token in enumerate(tokens))


def decode_greedily(wishes, allowed, prompt_length):
    """What greedy decoding makes of `wishes` [steps, N, vocabulary], scores that do not depend on the completion."""
    constraint = PrefixConstrainedLogitsProcessor(allowed, num_beams=1)
    sequences = torch.zeros(wishes.shape[1], prompt_length, dtype=torch.long)
    for scores in wishes:
        sequences = torch.cat([sequences, constraint(sequences, scores).argmax(-1, keepdim=True)], dim=1)
    return sequences[:, prompt_length:].tolist()


def test_any_model_completes_in_the_format(tokenizer):
    end, limit = tokenizer.convert_tokens_to_ids(END_OF_TURN), 128
    wishes = torch.randn(limit, 64, len(tokenizer), generator=torch.Generator().manual_seed(0))
    wishes[:, :32, end] -= 10  # half of the rows never want to stop
    completions = decode_greedily(wishes, predict.allowed_tokens(tokenizer, CATEGORIES, limit, 5), prompt_length=5)
    counts = []
    for completion in completions:
        text = tokenizer.decode(completion[: completion.index(end)])
        parsed = parse_text(text)
        assert not parsed.rejected and set(parsed.labels) <= set(CATEGORIES), text
        assert parsed.empty_answer == (text == NO_TABLE)
        counts.append(len(parsed.labels))
    assert 0 in counts and max(counts) == (limit - 1) // longest_unit(tokenizer, CATEGORIES) > 1


def test_every_pair_of_edges_can_be_written(tokenizer):
    allowed = predict.allowed_tokens(tokenizer, CATEGORIES, 64, prompt_length=1)
    head = ids(tokenizer, "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(")
    edges = (0, 1, 9, 10, 99, 100, 101, 499, 998, 999, 1000)
    for x0, x1 in itertools.product(edges, edges):
        completion = head + ids(tokenizer, f"{x0},7),({x1},8)<|box_end|><|im_end|>")
        assert walk(allowed, completion) == (x0 < x1), (x0, x1)
    for number in ("00", "01", "007", "1001", "", "-1", " 1"):
        assert not walk(allowed, head + ids(tokenizer, f"{number},7),(")), number


@pytest.mark.parametrize("objects", [
    {"bbox": [], "category_name": []},
    {"bbox": [[0.1, 0.2, 0.3, 0.4]], "category_name": ["nutrition-table-small-energy"]},
    {"bbox": [[0, 0, 1, 1], [0.5, 0.25, 1, 0.999]], "category_name": ["nutrition-table", "nutrition-table-text"]},
])
def test_a_well_formed_completion_is_not_changed(tokenizer, objects):
    completion = ids(tokenizer, target_text(objects) + "<|im_end|>")
    wishes = torch.nn.functional.one_hot(torch.tensor(completion), len(tokenizer)).float()[:, None]
    allowed = predict.allowed_tokens(tokenizer, CATEGORIES, 128, prompt_length=3)
    assert decode_greedily(wishes, allowed, prompt_length=3) == [completion]


def test_names_are_a_choice_and_may_begin_alike(tokenizer):
    allowed = predict.allowed_tokens(tokenizer, ("table", "table 2", "barcode"), 64, prompt_length=1)
    for name in ("table", "table 2", "barcode"):
        assert walk(allowed, ids(tokenizer, f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>(1"))
    assert not walk(allowed, ids(tokenizer, "<|object_ref_start|>nutrition-table<|object_ref_end|>"))


@pytest.mark.parametrize("names, limit, said", [
    (CATEGORIES, 20, "max_new_tokens=20 leaves no room for a box"), ((), 64, "at least one")])
def test_what_cannot_work_is_refused(names, limit, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        predict.allowed_tokens(tokenizer, names, limit, 1)


@pytest.mark.parametrize(("free_gib", "most"), [(80, 244), (15, 45), (0.1, 1)])
def test_a_batch_is_as_large_as_the_gpu_has_room_for(monkeypatch, free_gib, most):
    """By the published 7B: 57 KB of keys and values a token, and 142 KB for the widest layer."""
    config = Qwen2VLConfig.from_dict(json.loads(json.dumps(PUBLISHED)))
    for name, value in {"mem_get_info": (free_gib * 2**30, 0), "memory_reserved": 5, "memory_allocated": 5}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), config=config, dtype=torch.bfloat16)
    assert predict.room_for(on_gpu, 1408) == most
    assert predict.room_for(SimpleNamespace(device=torch.device("cpu")), 1408) > 10**6


def test_further_passes_find_what_the_first_box_hid(monkeypatch):
    """A model that names the leftmost white square and no other finds the second once the first is painted over."""
    picture = Image.new("RGB", (100, 50), (60, 60, 60))
    squares = {"0": [0.1, 0.2, 0.3, 0.6], "1": [0.6, 0.2, 0.8, 0.6]}
    for x0, y0, x1, y1 in squares.values():
        picture.paste((255, 255, 255), (round(100 * x0), round(50 * y0), round(100 * x1), round(50 * y1)))
    calls = []

    def leftmost(_model, _processor, rows, *_):
        calls.append(len(rows))
        left = [[box for box in squares.values() if row["image"].getpixel((int(100 * box[0]) + 5, 20))[0] == 255][:1]
                for row in rows]
        return [{"image_id": row["image_id"], "text": f"{boxes}", "boxes": boxes, "labels": ["t"] * len(boxes),
                 "confidences": [0.5] * len(boxes), "rejected": [], "stopped": True, "new_tokens": 3}
                for row, boxes in zip(rows, left, strict=True)]

    monkeypatch.setattr(predict, "generate_lines", leftmost)
    rows = [{"image_id": "two", "image": picture}, {"image_id": "none", "image": Image.new("RGB", (100, 50))}]
    first = leftmost(None, None, rows)
    two, none = predict.look_again(None, None, rows, first, PROMPT, {}, None, 9)
    assert two["boxes"] == [*squares.values()] and len(two["confidences"]) == len(two["labels"]) == 2
    assert two["text"].count("\n") == 1 and two["new_tokens"] == 9
    assert none == first[1] and calls == [2, 1, 1]  # the picture without a box was not looked at again
    assert predict.look_again(None, None, rows, first, PROMPT, {}, None, 1) == first
    assert picture.getpixel((15, 20)) == (255, 255, 255)


def test_passes_add_boxes_to_those_of_the_first(vlm, processor, rows, tmp_path):
    once, twice = (run(vlm, processor, rows, tmp_path / f"{n}.jsonl", passes=n, max_new_tokens=24) for n in (1, 2))
    for one, two in zip(once, twice, strict=True):
        assert two["boxes"][: len(one["boxes"])] == one["boxes"] and len(two["boxes"]) == len(two["confidences"])
    assert sum(len(two["boxes"]) for two in twice) > sum(len(one["boxes"]) for one in once) > 0
