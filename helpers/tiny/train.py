"""Trains the tiny base from random weights: batches of questions and the loop over them."""

import contextlib
import functools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers.tiny.learner import Learner, on
from helpers.tiny.pictures import Pool, disturb, model_size, patches, random_crop, take
from helpers.tiny.questions import NAMES, by_name, cropped, question

WHOLE = np.array([0.0, 0.0, 1.0, 1.0])


class Questions(IterableDataset):
    """Batches of questions about the scenes of a pool; every worker draws its own, from the seed and its number.

    Yields dicts: photo (height, width), picks [B] indices into the pool, crops [B, 4], size (height, width) that the
    model sees, input_ids [B * k, L], labels [B * k, L] (-100 outside the answer and its end token): k questions a
    picture, one after the other; kinds [B, N] and boxes [B, N, 4] for the guide. All pictures of a batch have one
    size; half of the batches are cropped.
    """

    def __init__(self, things: dict, processor: Qwen2VLProcessor, batch: int, each: int, seed: int):
        self.named = {photo: [by_name(scene) for scene in scenes] for photo, scenes in things.items()}
        named = self.named.items()
        self.askable = {photo: [i for i, scene in enumerate(s) if cropped(scene, WHOLE)] for photo, s in named}
        self.processor, self.batch, self.each, self.seed = processor, batch, each, seed

    def __iter__(self) -> Iterator[dict]:
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}-{info.id if info else 0}")
        draw = np.random.default_rng(rng.getrandbits(64))
        photos = list(self.askable)
        weights = [len(self.askable[photo]) for photo in photos]
        while True:
            photo = rng.choices(photos, weights)[0]
            picks = rng.choices(self.askable[photo], k=self.batch)
            crop_batch, crops, texts, maps = rng.random() < 0.5, [], [], []
            size = model_size(photo, self.processor.image_processor.size)
            for pick in picks:
                crop = random_crop(draw) if crop_batch else WHOLE
                named = cropped(self.named[photo][pick], crop)
                if not named:
                    crop, named = WHOLE, cropped(self.named[photo][pick], WHOLE)
                crops.append(crop)
                maps.append(token_map(named, size))
                texts += [question(named, rng) for _ in range(self.each)]
            kinds, boxes = (torch.from_numpy(np.stack(part)) for part in zip(*maps, strict=True))
            yield {"photo": photo, "picks": torch.tensor(picks), "crops": np.stack(crops), "size": size,
                   "kinds": kinds, "boxes": boxes, **encode(self.processor, texts, size)}  # fmt: skip


@functools.cache
def _frame(processor: Qwen2VLProcessor) -> tuple[str, str]:
    """The chat before and after the prompt, with one token for the picture."""
    content = [{"type": "image"}, {"type": "text", "text": "\0"}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, after = chat.split("\0")
    return before, after


@functools.lru_cache(4096)
def tokens(processor: Qwen2VLProcessor, text: str) -> list[int]:
    """Token ids of a text that may hold special tokens."""
    return processor.tokenizer.backend_tokenizer.encode(text).ids


def chat_ids(processor: Qwen2VLProcessor, prompt: str, size: tuple[int, int]) -> list[int]:
    """Token ids of the chat up to where the answer begins, for a picture that the model sees at `size`."""
    before, after = _frame(processor)
    pads = processor.image_token * (size[0] * size[1] // 784)
    return tokens(processor, before.replace(processor.image_token, pads)) + tokens(processor, prompt + after)


def encode(processor: Qwen2VLProcessor, texts: list[tuple[str, str]], size: tuple[int, int]) -> dict:
    """input_ids and labels [B, L], padded on the right, for (prompt, answer) pairs about pictures of one size."""
    asked = [chat_ids(processor, prompt, size) for prompt, _ in texts]
    told = [tokens(processor, answer + "<|im_end|>") for _, answer in texts]
    lengths = [len(a) + len(b) for a, b in zip(asked, told, strict=True)]
    count = size[0] * size[1] // 784
    longest = count + math.ceil((max(lengths) - count) / 64) * 64  # few different lengths: each is recorded once
    ids = np.full((len(texts), longest), processor.tokenizer.pad_token_id)
    labels = np.full_like(ids, -100)
    for i, (a, b) in enumerate(zip(asked, told, strict=True)):
        ids[i, : lengths[i]] = a + b
        labels[i, len(a) : lengths[i]] = b
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def token_map(named: dict[str, np.ndarray], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What the guide should read: kinds [N] and boxes [N, 4] under the image tokens, smaller things over larger."""
    rows, columns = size[0] // 28, size[1] // 28
    kinds, truth = np.zeros((rows, columns), np.int64), np.zeros((rows, columns, 4), np.float32)
    things = [(NAMES.index(name) + 1, box) for name, boxes in named.items() if name in NAMES for box in boxes]
    for kind, box in sorted(things, key=lambda thing: -np.prod(thing[1][2:] - thing[1][:2])):
        x0, y0, x1, y1 = box * [columns, rows, columns, rows]
        middle = int(min((y0 + y1) / 2, rows - 1)), int(min((x0 + x1) / 2, columns - 1))
        inside = (slice(math.ceil(y0 - 0.5), math.floor(y1 + 0.5)), slice(math.ceil(x0 - 0.5), math.floor(x1 + 0.5)))
        for where in (inside, middle):
            kinds[where], truth[where] = kind, box
    return kinds.reshape(-1), truth.reshape(-1, 4)


def train(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, pool: Pool, out: str | Path, *,
    steps: int, batch: int = 64, each: int = 4, peak: float = 2e-3, guided: float = 0.5, decay: float = 0.999,
    seed: int = 0, workers: int = 2, device: str = "cpu", save_every: int = 1000, log_every: int = 50,
    seconds: float = math.inf,
) -> Qwen2VLForConditionalGeneration:  # fmt: skip
    """Train `model`; returns the running average of its weights. Goes on from `out/state.pt` where there is one.

    Ends after `steps` steps, or `seconds`, and the rate falls accordingly. The guide's loss counts less and less
    over the first part, `guided` of the whole. `out/log.jsonl` has a line per `log_every` steps.
    """
    learner = Learner(model.float().to(device).train(), peak, decay, guided)
    first, began, losses = learner.restore(Path(out) / "state.pt"), time.time(), []
    data = Questions(pool.things, processor, batch, each, seed + first)
    loader = DataLoader(data, None, num_workers=workers, collate_fn=dict, prefetch_factor=8 if workers else None)
    generator = torch.Generator(device).manual_seed(seed + first)
    with contextlib.nullcontext() if device == "cpu" else torch.cuda.stream(torch.cuda.Stream()):
        for step, item in enumerate(loader, start=first):
            progress = max(step / steps, (time.time() - began) / seconds)
            if progress >= 1:
                break
            images = pool.images[item["photo"]]
            images = images[on(images.device, item["picks"])].to(device)
            pixels = patches(disturb(take(images, item["crops"], item["size"], exact=False), generator))
            losses.append(learner.step(pixels, item, progress))
            if (step + 1) % log_every == 0:
                answer, guide = torch.stack(losses).mean(0).tolist()
                line = {"step": step + 1, "questions": (step + 1) * batch * each, "loss": round(answer, 4),
                        "guide": round(guide, 4), "rate": round(learner.rate.item(), 8),
                        "seconds": round(time.time() - began, 1)}  # fmt: skip
                with open(Path(out) / "log.jsonl", "a") as file:
                    print(json.dumps(line), file=file)
                losses.clear()
            if (step + 1) % save_every == 0:
                learner.save(Path(out) / "state.pt", step + 1)
    model.load_state_dict(learner.mean, strict=False)
    return model.eval()


