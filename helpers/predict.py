"""Batched greedy generation: one JSON line a picture, with a confidence for every box. Goes on where it was killed."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from helpers.boxes import distinct, pairwise_iou
from helpers.collate import image_tokens
from helpers.data.pictures import as_rgb, painted_over
from helpers.messages import END_OF_TURN, NO_TABLE, longest_unit, parse_text, to_messages
from helpers.runs import progress_bar

BOX_BEGINS = "<|object_ref_start|>"  # the first token of a box's text
AT_ONCE = 4  # pictures that the vision tower encodes together: more gain nothing, and leave a CPU's cache
PROMPT_TOKENS = 128  # of text, about, with the completion
DIGITS_ROOT = 4  # of the digits' part in a confidence (`line`)
# without cuDNN's, which plans anew for every key length: on Hopper 100-300 ms for each token of a batch
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def predict(model, processor, rows, prompt: str, path: Path, *, batch_size: int, key: str,
            names: Sequence[str] | None = None, passes: int = 1, **generation) -> list[dict]:
    """Run inference on every row and write one JSON line a picture to `path`, in the order of `rows`.

    Args:
        rows: a `datasets.Dataset` of the project's schema, N pictures.
        key: a hash over all that the predictions depend on. Lines of a killed call with the same key are kept.
        names: constrained decoding with these names (`allowed_tokens`); None: any text.
        passes: how often inference runs on a picture at most (`look_again`).
        generation: arguments of `model.generate`, such as `max_new_tokens` and `do_sample`.

    Under a launcher each process takes every world-size-th picture and writes lines of its own, which rank 0 puts
    together. All return all lines: `{"image_id", "text", "labels", "boxes" [[x0, y0, x1, y1]] in 0-1, "confidences"
    (0-1), "rejected", "stopped", "new_tokens"}`.
    """
    size = processor.image_processor.size
    tokens = image_tokens(zip(rows["width"], rows["height"], strict=True), size["shortest_edge"], size["longest_edge"])
    longest_first = sorted(range(len(rows)), key=lambda i: -tokens[i])
    model.eval()
    write_lines(path, list(rows["image_id"]), lambda todo: generate_batches(model, processor, rows, todo, prompt,
                generation, names, batch_size, passes), order=longest_first, key=key)
    lines = read_jsonl(path)
    unstopped = sum(not line["stopped"] for line in lines)
    if unstopped:
        print(f"{path.stem}: {unstopped} of {len(lines)} completions never stopped: they are cut at "
              f"max_new_tokens={generation['max_new_tokens']}.")
    return lines


def write_lines(path: Path, ids: Sequence[str], work: Callable[[list[int]], Iterator[list[dict]]], *,
                order: Iterable[int] | None = None, key: str = "lines", name: str = "image_id",
                before: Sequence[Path] = ()) -> None:
    """Write one JSON line for each of `ids` to `path`, in their order; what a killed call has written is kept.

    Args:
        ids: what stands under `name` in each line; no two are equal.
        work: called once with the numbers of those that are missing, yields some of their lines at a time, in any
            order; each is appended to a file in the folder `path` with the suffix .parts at once.
        order: of the work, all numbers; None: that of `ids`. Under a launcher each process takes every world-size-th.
        key: a hash over all that the lines depend on besides their id. Lines of another key are not kept.
        before: files whose lines are kept too.
    """
    processes, parts = PartialState(cpu=not torch.cuda.is_available()), path.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    mine = [*(range(len(ids)) if order is None else order)][processes.process_index :: processes.num_processes]
    done = _places([*before, *parts.glob(f"{key}.*.jsonl")], name)
    todo = [i for i in mine if ids[i] not in done]
    bar = progress_bar(len(mine), len(mine) - len(todo), path.stem, "picture", shown=processes.is_main_process)
    with bar, (parts / f"{key}.{processes.process_index}.jsonl").open("a") as file:
        file.write("\n")  # ends a line that a kill has cut
        for lines in work(todo) if todo else ():
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            bar.update(len(lines))
    processes.wait_for_everyone()
    if processes.is_main_process:
        sources, whole = [*before, *parts.glob(f"{key}.*.jsonl")], path.with_name(path.name + ".part")
        places = _places(sources, name)
        with ExitStack() as opened, whole.open("wb") as file:
            files = {source: opened.enter_context(source.open("rb")) for source in sources}
            for one in ids:
                source, at = places[one]
                files[source].seek(at)
                file.write(files[source].readline().rstrip() + b"\n")
        whole.replace(path)
        shutil.rmtree(parts)
    processes.wait_for_everyone()


def _places(files: Iterable[Path], name: str) -> dict[str, tuple[Path, int]]:
    """`{line[name]: (file, offset)}` of all lines that are whole; there are too many to hold them in memory."""
    found = {}
    for path in files:
        at = 0
        with path.open("rb") as file:
            for text in file:
                with suppress(json.JSONDecodeError):  # empty, or cut by a kill
                    found[json.loads(text)[name]] = path, at
                at += len(text)
    return found


def generate_batches(model, processor, rows, todo: Sequence[int], prompt: str, generation: dict,
                     names: Sequence[str] | None, batch_size: int, passes: int = 1) -> Iterator[list[dict]]:
    """The lines of each batch of the rows `todo`, whose first is the largest picture: that a batch of such fits is
    known before. Where memory runs out all the same, it goes on with batches of half the size.

    On a GPU other processes open the coming pictures, where `rows` is a data set and no list of pictures.
    """
    size = processor.image_processor.size
    largest = as_rgb(rows[todo[0]]["image"]).size if todo else (1, 1)
    most = image_tokens([largest], size["shortest_edge"], size["longest_edge"]).max()
    done, batch_size = 0, min(batch_size, len(todo), room_for(model, int(most) + PROMPT_TOKENS))
    workers = 0 if model.device.type == "cpu" or isinstance(rows, list) else 4
    while done < len(todo):
        encoded: list[dict] = []
        try:
            for batch in DataLoader(Subset(rows, todo[done:]), min(AT_ONCE, batch_size), num_workers=workers,
                                    collate_fn=partial(model_inputs, processor=processor, prompt=prompt)):
                encoded += encode_pictures(model, batch)
                while len(encoded) >= batch_size or (encoded and done + len(encoded) == len(todo)):
                    lines = complete(model, processor, encoded[:batch_size], generation, names)
                    if passes > 1:
                        own = [rows[i] for i in todo[done : done + len(lines)]]
                        lines = look_again(model, processor, own, lines, prompt, generation, names, passes)
                    encoded, done = encoded[batch_size:], done + len(lines)
                    yield lines
            return
        except RuntimeError as error:
            if batch_size == 1 or not should_reduce_batch_size(error):
                raise
        batch_size //= 2
        print(f"out of memory: going on with batches of {batch_size}")
        encoded.clear()
        clear_device_cache(garbage_collection=True)  # here the error, which holds on to the batch's tensors, is gone


def look_again(model, processor, rows: Sequence[dict], lines: Sequence[dict], prompt: str, generation: dict,
               names: Sequence[str] | None, passes: int) -> list[dict]:
    """The lines of a batch of `rows` with the boxes of further passes, up to `passes` in all.

    A model that has learned from pictures with one table names one and stops, though it finds the next where the first
    is gone. So the boxes found are painted over with the picture's mean colour and inference runs again, until nothing
    new is found (as in adversarial erasing, https://arxiv.org/abs/1703.08448). A box is new whose IoU with those of the
    passes before is at most .5. `text` holds the texts of the passes that found something, a line each.
    """
    lines, todo = [dict(line) for line in lines], [i for i, line in enumerate(lines) if line["boxes"]]
    for _ in range(passes - 1):
        if not todo:
            break
        erased = [rows[i] | {"image": painted_over(rows[i]["image"], lines[i]["boxes"])} for i in todo]
        found, todo_before, todo = generate_lines(model, processor, erased, prompt, generation, names), todo, []
        for i, more in zip(todo_before, found, strict=True):
            line = lines[i]
            known = pairwise_iou(more["boxes"], line["boxes"]).max(1) > 0.5 if more["boxes"] else []
            new = [k for k, seen in enumerate(known) if not seen]
            line |= {name: line[name] + [more[name][k] for k in new] for name in ("labels", "boxes", "confidences")}
            line |= {"rejected": line["rejected"] + more["rejected"], "stopped": line["stopped"] and more["stopped"],
                     "new_tokens": line["new_tokens"] + more["new_tokens"]}
            if new:
                line["text"] += "\n" + more["text"]
                todo.append(i)
    return lines


def room_for(model, tokens: int) -> int:
    """How many prompts of so many tokens the GPU has memory for at once: their keys and values, and what the widest
    layer makes of them (gate, up and their product); at least 1. Without a GPU: any number."""
    if model.device.type != "cuda":
        return 10**9
    text, cuda = model.config.get_text_config(), torch.cuda
    head = text.hidden_size // text.num_attention_heads
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * head + 3 * text.intermediate_size
    free = cuda.mem_get_info()[0] + cuda.memory_reserved() - cuda.memory_allocated()
    return max(1, int(0.8 * free / (tokens * (numbers + 4 * text.hidden_size) * model.dtype.itemsize)))


def generate_lines(model, processor, rows: Sequence[dict], prompt: str, generation: dict,
                   names: Sequence[str] | None = None, passes: int = 1) -> list[dict]:
    """One batch: the lines of `predict`, in the order of `rows`."""
    encoded = encode_pictures(model, model_inputs(rows, processor, prompt))
    lines = complete(model, processor, encoded, generation, names)
    return look_again(model, processor, rows, lines, prompt, generation, names, passes)


def model_inputs(rows: Sequence[dict], processor, prompt: str) -> dict:
    """N rows as the processor's batch, padded to T tokens, on the CPU: `input_ids`, `attention_mask`,
    `mm_token_type_ids` [N, T], `pixel_values` [patches, 1176], `image_grid_thw` [N, 3]; and `image_id`, a list."""
    chats = [to_messages(row, prompt)["prompt"] for row in rows]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [as_rgb(row["image"]) for row in rows]
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return {**batch, "image_id": [row["image_id"] for row in rows]}


@torch.inference_mode()
def encode_pictures(model, batch: dict) -> list[dict]:
    """What `complete` needs of each of N pictures: its own part of `batch` (`model_inputs`), without padding, and in
    place of pixels the `features` [image tokens, hidden] that the vision tower makes of them."""
    few = batch["image_grid_thw"].split(AT_ONCE)
    pixels = batch["pixel_values"].split([int(grids.prod(-1).sum()) for grids in few])
    features = [own for patches, grids in zip(pixels, few, strict=True) for own in
                model.get_image_features(patches.to(model.device), grids.to(model.device)).pooler_output]
    real = batch["attention_mask"].bool()
    return [{"image_id": batch["image_id"][i], "image_grid_thw": batch["image_grid_thw"][i], "features": own,
             "input_ids": batch["input_ids"][i][real[i]], "mm_token_type_ids": batch["mm_token_type_ids"][i][real[i]]}
            for i, own in enumerate(features)]


@torch.inference_mode()
def complete(model, processor, encoded: Sequence[dict], generation: dict, names: Sequence[str] | None) -> list[dict]:
    """The lines of encoded pictures (`encode_pictures`), one batch, padded on the left.

    Confidences are the model's own, before a constraint.
    """
    def padded(parts: Iterable[torch.Tensor], value: int = 0) -> torch.Tensor:
        return pad_sequence(list(parts), batch_first=True, padding_value=value, padding_side="left").to(model.device)

    features = tuple(one["features"] for one in encoded)
    batch = {
        "input_ids": padded((one["input_ids"] for one in encoded), processor.tokenizer.pad_token_id),
        "attention_mask": padded(torch.ones_like(one["input_ids"]) for one in encoded),
        "mm_token_type_ids": padded(one["mm_token_type_ids"] for one in encoded),
        "image_grid_thw": torch.stack([one["image_grid_thw"] for one in encoded]).to(model.device),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
    }
    length = batch["input_ids"].shape[1]
    if names is not None:
        allowed = allowed_tokens(processor.tokenizer, names, generation["max_new_tokens"], length)
        generation = generation | {"prefix_allowed_tokens_fn": allowed}
    with sdpa_kernel(KERNELS):
        out = model.generate(**batch, **generation, return_dict_in_generate=True, output_logits=True)
    scores = model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)  # [N, new tokens]
    completions = out.sequences[:, length:]
    return [line(one["image_id"], tokens, logs, processor.tokenizer)
            for one, tokens, logs in zip(encoded, completions.tolist(), scores.tolist(), strict=True)]


def allowed_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], max_new_tokens: int,
                   prompt_length: int) -> Callable[[int, torch.Tensor], list[int]]:
    """Constrained decoding, as `generate`'s `prefix_allowed_tokens_fn`: the form is fixed, names and digits are free.

        completion = "no nutrition table" <|im_end|>  |  unit, as often as surely fits, <|im_end|>
        unit       = <|object_ref_start|>NAME<|object_ref_end|><|box_start|>(x0,y0),(x1,y1)<|box_end|>

    NAME is one of `names`; coordinates are whole numbers from 0 to 1000 without leading zeros, x0 < x1, y0 < y1. The
    completion begins behind `prompt_length` tokens. Raises ValueError where no box fits into `max_new_tokens`.
    """
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    longest = longest_unit(tokenizer, names)
    most = (max_new_tokens - 1) // longest
    if most < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a box: it takes up to {longest} "
                         "tokens, and one more to stop.")
    digits = {ids(digit)[0]: digit for digit in "0123456789"}
    heads = [ids(f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>(") for name in names]
    stop, denial = ids(END_OF_TURN), ids(NO_TABLE + END_OF_TURN)
    closings = [ids(text) for text in (",", "),(", ",", ")<|box_end|>")]  # what follows each of the four numbers

    def allowed(row: int, sequence: torch.Tensor) -> list[int]:
        written = sequence[prompt_length:].tolist()
        if stop[0] in written:
            return stop
        ends = [place for place, token in enumerate(written, 1) if token == closings[3][-1]]
        unit = written[ends[-1]:] if ends else written
        choices = (heads if len(ends) < most else []) + [stop if ends else denial]
        (choice, *_) = fitting = [one for one in choices if one[: len(unit)] == unit[: len(one)]]
        if len(choice) > len(unit):
            return sorted({one[len(unit)] for one in fitting})
        rest, numbers = unit[len(choice):], []
        for place, closing in enumerate(closings):
            number = "".join(digits[token] for token in takewhile(digits.__contains__, rest))
            rest = rest[len(number):]
            low, high = (0, 999) if place < 2 else (numbers[place - 2] + 1, 1000)
            if not rest:
                more = [token for token, digit in digits.items() if _leads_to(number + digit, low, high)]
                return more + (closing[:1] if number and low <= int(number) <= high else [])
            if len(rest) < len(closing):
                return [closing[len(rest)]]
            rest = rest[len(closing):]
            numbers.append(int(number))
        raise AssertionError("a unit ends with <|box_end|>")

    return allowed


def _leads_to(written: str, low: int, high: int) -> bool:
    """Whether a number from `low` to `high` begins with these digits; nothing follows a leading zero."""
    if written[0] == "0":
        return written == "0" and low == 0
    return any(int(written) * tail <= high and (int(written) + 1) * tail > low for tail in (1, 10, 100, 1000))


def line(image_id: str, tokens: list[int], log_probabilities: list[float], tokenizer) -> dict:
    """One completion (token ids and their log-probabilities, padding behind) as a line of `predictions.jsonl`.

    A box that is drawn again stays in `text` alone (`boxes.distinct`).
    """
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    stopped = end in tokens
    tokens = tokens[: tokens.index(end)] if stopped else tokens
    pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
    text = "".join(pieces)
    parsed = parse_text(text)
    starts, kept = [0, *accumulate(map(len, pieces))], distinct(parsed.boxes_xyxy_unit, parsed.labels)

    def confidence(begin: int, end: int) -> float:
        """The probability that a box begins here, in place of the end, times the fourth root of its digits' geometric
        mean: 0-1.

        The first says whether there is a table, the second where it is. It counts less, as a last digit that might be
        its neighbour hardly moves a box; the root was chosen on `selection` (`notebooks/10_better_boxes`).
        """
        digits = [log for piece, start, log in zip(pieces, starts, log_probabilities, strict=False)
                  if begin <= start < end and re.search(r"\d", piece)]
        first = max((i for i, piece in enumerate(pieces) if piece == BOX_BEGINS and starts[i] < begin), default=0)
        return round(math.exp(log_probabilities[first] + sum(digits) / len(digits) / DIGITS_ROOT), 4)

    return {
        "image_id": image_id, "text": text, "labels": [parsed.labels[i] for i in kept],
        "boxes": parsed.boxes_xyxy_unit[kept].tolist(), "confidences": [confidence(*parsed.spans[i]) for i in kept],
        "rejected": parsed.rejected, "stopped": stopped, "new_tokens": len(tokens) + stopped,
    }


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().split("\n") if text]
