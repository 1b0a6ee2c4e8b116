"""Batched greedy generation: one JSON line a picture, with a confidence for every box. Goes on where it was killed."""

import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Subset
from transformers.modeling_outputs import BaseModelOutputWithPooling

from helpers.data.pictures import as_rgb
from helpers.grammar import Grammar, GrammarConstraint
from helpers.messages import parse_text, to_messages
from helpers.runs import progress_bar

AT_ONCE = 4  # pictures that the vision tower looks at together
# without cuDNN's, which plans anew for every key length: on Hopper 100-300 ms for each token of a batch
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def predict(model, processor, rows, prompt: str, path: Path, *, batch_size: int, key: str,
            names: Sequence[str] | None = None, **generation) -> list[dict]:
    """Ask `model` about every row and write one JSON line a picture to `path`, in the order of `rows`.

    Args:
        rows: a `datasets.Dataset` of the project's schema, N pictures.
        key: a hash over all that the answers depend on. Lines of a killed call with the same key are kept.
        names: lets only answers in the project's format through, with these names (`Grammar`); None: any text.
        generation: arguments of `model.generate`, such as `max_new_tokens` and `do_sample`.

    Under a launcher each process takes every world-size-th picture, and rank 0 writes the file; all return all lines:
    `{"image_id", "text", "labels", "boxes" [[x0, y0, x1, y1]] in 0-1, "confidences" (0-1), "rejected", "stopped",
    "new_tokens"}`. A batch that does not fit into memory is halved. On a GPU other processes open the coming pictures.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parts = path.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    tokens = [_tokens(size, processor) for size in _sizes(rows)]
    longest_first = sorted(range(len(rows)), key=lambda i: -tokens[i])
    mine = longest_first[rank::world]
    done = _read_parts(parts, key)
    ids = list(rows["image_id"])
    todo = [i for i in mine if ids[i] not in done]
    model.eval()
    bar = progress_bar(len(mine), len(mine) - len(todo), path.stem, "picture", shown=rank == 0)
    own = parts / f"{key}.{rank}.jsonl"
    own.write_text("".join(_as_text(line) for line in _whole_lines(own)))  # drops a line that a kill has cut
    pieces = DataLoader(Subset(rows, todo), AT_ONCE, collate_fn=partial(prepare, processor=processor, prompt=prompt),
                        num_workers=0 if model.device.type == "cpu" else 4)
    with own.open("a") as file:
        try:
            for lines in _answers(model, processor, pieces, generation, names, batch_size):
                file.write("".join(_as_text(line) for line in lines))
                file.flush()
                bar.update(len(lines))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(f"a process that opens pictures died ({str(error).splitlines()[0]}), most often for "
                               "want of memory or of room in /dev/shm. The same command goes on after the "
                               f"{len(list(_whole_lines(own)))} pictures that are answered.") from error
    bar.close()
    _wait_for_all(world)
    if rank == 0:
        _join(parts, key, ids, path)
    _wait_for_all(world)
    lines = read_jsonl(path)
    unstopped = sum(not line["stopped"] for line in lines)
    if unstopped:
        print(f"{path.stem}: {unstopped} of {len(lines)} answers never stopped: they are cut at "
              f"max_new_tokens={generation['max_new_tokens']}.")
    return lines


def _answers(model, processor, pieces: Iterable[dict], generation: dict, names: Sequence[str] | None,
             batch_size: int) -> Iterator[list[dict]]:
    """The lines of each batch. Each of the `pieces` (`prepare`) is looked at as it comes, and its pictures wait until
    `batch_size` are together. Where memory runs out, whoever looked or answered goes on with half as many."""
    coming, waiting = iter(pieces), []
    piece = next(coming, None)
    while piece or waiting:
        unseen, done = piece if len(waiting) < batch_size else None, None
        together = min(batch_size, len(waiting) + (len(unseen["image_id"]) if unseen else 0))
        try:
            if unseen:
                done = see(model, unseen, min(AT_ONCE, batch_size))
            else:
                done = answer(model, processor, waiting[:batch_size], generation, names)
        except Exception as error:
            if together == 1 or not should_reduce_batch_size(error):
                raise
        if done is None:  # here the error, which holds on to the batch's tensors, is gone
            clear_device_cache(garbage_collection=True)
            batch_size = together // 2
            print(f"out of memory: going on with batches of {batch_size}")
        elif unseen:
            waiting += done
            piece = next(coming, None)
        else:
            waiting = waiting[batch_size:]
            yield done


def generate_lines(model, processor, rows: Sequence[dict], prompt: str, generation: dict,
                   names: Sequence[str] | None = None) -> list[dict]:
    """One batch: the lines of `predict`, in the order of `rows`."""
    return answer(model, processor, see(model, prepare(rows, processor, prompt)), generation, names)


def prepare(rows: Sequence[dict], processor, prompt: str) -> dict:
    """N rows as the processor's batch, padded to T tokens, on the CPU: `input_ids`, `attention_mask`,
    `mm_token_type_ids` [N, T], `pixel_values` [patches, 1176], `image_grid_thw` [N, 3]; and `image_id`, a list."""
    chats = [to_messages(row, prompt)["prompt"] for row in rows]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [as_rgb(row["image"]) for row in rows]
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return {**batch, "image_id": [row["image_id"] for row in rows]}


@torch.inference_mode()
def see(model, batch: dict, at_once: int = AT_ONCE) -> list[dict]:
    """What `answer` needs of each of N pictures: from `batch` (`prepare`) its own part, without padding, and in the
    place of pixels `view` [image tokens, hidden], on the model's device."""
    views = look(model, batch["pixel_values"], batch["image_grid_thw"], at_once).pooler_output
    real = batch["attention_mask"].bool()
    return [{"image_id": batch["image_id"][i], "image_grid_thw": batch["image_grid_thw"][i], "view": view,
             "input_ids": batch["input_ids"][i][real[i]], "mm_token_type_ids": batch["mm_token_type_ids"][i][real[i]]}
            for i, view in enumerate(views)]


@torch.inference_mode()
def answer(model, processor, seen: Sequence[dict], generation: dict, names: Sequence[str] | None) -> list[dict]:
    """The lines of pictures that were looked at (`see`), one batch, padded on the left.

    Confidences are the model's own, before a constraint.
    """
    def padded(parts: Iterable[torch.Tensor], value: int = 0) -> torch.Tensor:
        return pad_sequence(list(parts), batch_first=True, padding_value=value, padding_side="left").to(model.device)

    batch = {
        "input_ids": padded((one["input_ids"] for one in seen), processor.tokenizer.pad_token_id),
        "attention_mask": padded(torch.ones_like(one["input_ids"]) for one in seen),
        "mm_token_type_ids": padded(one["mm_token_type_ids"] for one in seen),
        "image_grid_thw": torch.stack([one["image_grid_thw"] for one in seen]).to(model.device),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tuple(one["view"] for one in seen))},
    }
    length = batch["input_ids"].shape[1]
    if names is not None:
        grammar = Grammar(processor.tokenizer, names, max_new_tokens=generation["max_new_tokens"])
        generation = generation | {"logits_processor": [GrammarConstraint(grammar, length)]}
    with sdpa_kernel(KERNELS):
        out = model.generate(**batch, **generation, return_dict_in_generate=True, output_logits=True)
    scores = model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)  # [N, new tokens]
    answers = out.sequences[:, length:]
    return [line(one["image_id"], tokens, logs, processor.tokenizer)
            for one, tokens, logs in zip(seen, answers.tolist(), scores.tolist(), strict=True)]


def look(model, pixel_values: torch.Tensor, grids: torch.Tensor, at_once: int = AT_ONCE) -> BaseModelOutputWithPooling:
    """The vision tower's view of a batch, as `model.generate` takes it: `pooler_output` is N tensors [tokens, hidden].

    `pixel_values` [patches, 1176] and `grids` [N, 3] are the processor's. The tower works on `at_once` pictures at a
    time: it gains nothing from more, and on a CPU its activations then stay in the cache.
    """
    few = grids.split(at_once)
    pieces = pixel_values.split([int(grid.prod(-1).sum()) for grid in few])
    views = [model.get_image_features(pixels.to(model.device), grid.to(model.device)).pooler_output
             for pixels, grid in zip(pieces, few, strict=True)]
    return BaseModelOutputWithPooling(pooler_output=tuple(tokens for view in views for tokens in view))


def line(image_id: str, tokens: list[int], log_probabilities: list[float], tokenizer) -> dict:
    """One answer (token ids and their log-probabilities, padding behind) as a line of `predictions.jsonl`."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stopped = end in tokens
    tokens = tokens[: tokens.index(end)] if stopped else tokens
    pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
    text = "".join(pieces)
    parsed = parse_text(text)
    return {
        "image_id": image_id, "text": text, "labels": parsed.labels, "boxes": parsed.boxes_xyxy_unit.tolist(),
        "confidences": [round(_confidence(span, pieces, log_probabilities), 4) for span in parsed.spans],
        "rejected": parsed.rejected, "stopped": stopped, "new_tokens": len(tokens) + stopped,
    }


def _confidence(span: tuple[int, int], pieces: list[str], log_probabilities: list[float]) -> float:
    """exp of the mean log-probability of the tokens that carry a box's digits (0-1)."""
    digits, at = [], 0
    for piece, log_probability in zip(pieces, log_probabilities, strict=False):
        if span[0] <= at < span[1] and re.search(r"\d", piece):
            digits.append(log_probability)
        at += len(piece)
    return math.exp(sum(digits) / len(digits))


def _sizes(rows) -> list[tuple[int, int]]:
    """(width, height) of every picture, from its file's head: nothing is decoded."""
    sizes = []
    for picture in rows.select_columns("image").cast_column("image", datasets.Image(decode=False)):
        stored = picture["image"]
        with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
            sizes.append(image.size)
    return sizes


def _tokens(size: tuple[int, int], processor) -> int:
    """Image tokens of a picture of `size` (width, height) under the processor's pixel budget."""
    patches = processor.image_processor.get_number_of_image_patches(size[1], size[0])
    return patches // processor.image_processor.merge_size**2


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().split("\n") if text]


def _as_text(line: dict) -> str:
    return json.dumps(line) + "\n"


def _whole_lines(path: Path) -> Iterator[dict]:
    for text in path.read_text().split("\n") if path.is_file() else []:
        try:
            yield json.loads(text)
        except json.JSONDecodeError:  # the empty end, or a line cut by a kill
            return


def _read_parts(parts: Path, key: str) -> dict[str, dict]:
    return {row["image_id"]: row for path in sorted(parts.glob(f"{key}.*.jsonl")) for row in _whole_lines(path)}


def _join(parts: Path, key: str, image_ids: list[str], path: Path) -> None:
    lines = _read_parts(parts, key)
    part = path.with_suffix(".part")
    part.write_text("".join(_as_text(lines[image_id]) for image_id in image_ids))
    part.replace(path)
    for old in parts.iterdir():
        old.unlink()
    parts.rmdir()


def _wait_for_all(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()
