"""Trains the tiny base from random weights: `python -m helpers.tiny.train runs/tiny` does all of it.

Called again, it goes on from its last checkpoint. It takes a GPU: on a CPU it would be days.
"""

import argparse
import inspect
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from helpers.messages import END_OF_TURN
from helpers.scenes import SPLITS, THINGS
from helpers.tiny import check
from helpers.tiny.build import make_model, make_processor, save
from helpers.tiny.pictures import Pool, Size, disturb, load_pool, random_crop, take
from helpers.tiny.prompts import WHOLE, by_name, cropped, prompt_for

PEAK, WEIGHT_DECAY = 2e-3, 0.05  # of both optimizers
GUIDED = 0.5  # of the training, in which the guide's loss counts less and less
AVERAGED = 0.999  # of the running average of the weights stays at each step


class Prompts(IterableDataset):
    """Batches of prompts about the scenes of a pool; every worker draws its own, from the seed and its number.

    Yields dicts: photo (height, width), picks [B] indices into the pool, crops [B, 4], size (height, width) of the
    model's input, input_ids [B * k, L], labels [B * k, L] (-100 outside the completion): k prompts a picture, one
    after the other; kinds [B, N] and boxes [B, N, 4] for the guide. All pictures of a batch have one size; half of the
    batches are cropped.
    """

    def __init__(self, things: dict[Size, list], processor: Qwen2VLProcessor, batch: int, each: int, seed: int):
        self.named = {photo: [by_name(scene) for scene in scenes] for photo, scenes in things.items()}
        named = self.named.items()
        self.usable = {photo: [i for i, scene in enumerate(scenes) if cropped(scene, WHOLE)] for photo, scenes in named}
        self.processor, self.batch, self.each, self.seed = processor, batch, each, seed

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        rng = random.Random(f"{self.seed}-{info.id if info else 0}")
        draw = np.random.default_rng(rng.getrandbits(64))
        photos, limits = list(self.usable), self.processor.image_processor.size
        weights = [len(self.usable[photo]) for photo in photos]
        while True:
            photo = rng.choices(photos, weights)[0]
            picks = rng.choices(self.usable[photo], k=self.batch)
            crop_batch, crops, texts, maps = rng.random() < 0.5, [], [], []
            size = smart_resize(*photo, 28, limits["shortest_edge"], limits["longest_edge"])
            for pick in picks:
                crop = random_crop(draw) if crop_batch else WHOLE
                named = cropped(self.named[photo][pick], crop)
                if not named:
                    crop, named = WHOLE, cropped(self.named[photo][pick], WHOLE)
                crops.append(crop)
                maps.append(token_map(named, size))
                texts += [prompt_for(named, rng) for _ in range(self.each)]
            kinds, boxes = (torch.from_numpy(np.stack(part)) for part in zip(*maps, strict=True))
            yield {"photo": photo, "picks": torch.tensor(picks), "crops": np.stack(crops), "size": size,
                   "kinds": kinds, "boxes": boxes, **encode(self.processor, texts, size)}  # fmt: skip


def encode(processor: Qwen2VLProcessor, texts: list[tuple[str, str]], size: Size) -> dict[str, torch.Tensor]:
    """input_ids and labels [B, L], padded on the right, for (prompt, completion) pairs about pictures of one size."""
    content = [{"type": "image"}, {"type": "text", "text": "{prompt}"}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    chat = chat.replace(processor.image_token, processor.image_token * (size[0] * size[1] // 28**2))
    prompts = processor.tokenizer([chat.replace("{prompt}", prompt) for prompt, _ in texts]).input_ids
    completions = processor.tokenizer([completion + END_OF_TURN for _, completion in texts]).input_ids
    pairs = list(zip(prompts, completions, strict=True))
    ids = [torch.tensor(prompt + completion) for prompt, completion in pairs]
    labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in pairs]
    return {"input_ids": pad_sequence(ids, True, processor.tokenizer.pad_token_id),
            "labels": pad_sequence(labels, True, -100)}  # fmt: skip


def token_map(named: dict[str, np.ndarray], size: Size) -> tuple[np.ndarray, np.ndarray]:
    """What the guide should read: kinds [N] and boxes [N, 4] under the image tokens, smaller things over larger."""
    rows, columns = size[0] // 28, size[1] // 28
    kinds, truth = np.zeros((rows, columns), np.int64), np.zeros((rows, columns, 4), np.float32)
    things = [(THINGS.index(name) + 1, box) for name, boxes in named.items() for box in boxes]
    for kind, box in sorted(things, key=lambda thing: -np.prod(thing[1][2:] - thing[1][:2])):
        x0, y0, x1, y1 = box * [columns, rows, columns, rows]
        middle = int(min((y0 + y1) / 2, rows - 1)), int(min((x0 + x1) / 2, columns - 1))
        inside = (slice(math.ceil(y0 - 0.5), math.floor(y1 + 0.5)), slice(math.ceil(x0 - 0.5), math.floor(x1 + 0.5)))
        for where in (inside, middle):
            kinds[where], truth[where] = kind, box
    return kinds.reshape(-1), truth.reshape(-1, 4)


class Guide(torch.nn.Module):
    """A crutch for the first part of the training, thrown away after it: what lies under each image token, and where.

    Without it the model writes well-formed boxes that ignore the picture for thousands of steps: the completions
    alone say too little about where to look. From the states [B, N, width] half-way up the language model it reads the
    kind of thing (0 for none) and the thing's box (x0, y0, x1, y1 in 0-1) under each image token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.out = torch.nn.LayerNorm(width), torch.nn.Linear(width, 1 + len(THINGS) + 4)

    def loss(self, states: torch.Tensor, kinds: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """`kinds` [B, N] whole numbers, `boxes` [B, N, 4]; cross-entropy plus five times the boxes' mean error."""
        read = self.out(self.norm(states.float()))
        inside = (kinds > 0).float()
        error = (read[..., -4:].sigmoid() - boxes).abs().mean(-1)
        wrong = F.cross_entropy(read[..., :-4].flatten(0, 1), kinds.flatten())
        return wrong + 5 * (error * inside).sum() / inside.sum().clamp(min=1)


def learning_rate(progress: float, rise: float = 0.04) -> float:
    """One cycle over `progress` 0-1: up in a straight line to `PEAK`, then down along a cosine to 1 % of it."""
    share = progress / rise if progress < rise else 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / (1 - rise))
    return PEAK * (0.01 + 0.99 * share)


def forward(model, pixels: torch.Tensor, grids: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor):
    """The completions' loss, and half-way up the language model the states of the image tokens [B, N, width].

    `pixels` and `grids` [B, 3] are the image processor's, for pictures of one size; `ids` and `labels` [B * k, L]. The
    vision tower encodes each picture once for its k prompts, and positions are the same in every row.
    """
    image, each = ids[0] == model.config.image_token_id, len(ids) // len(grids)
    positions, _ = model.model.get_rope_index(ids[:1], mm_token_type_ids=image[None].int(), image_grid_thw=grids[:1])
    features = model.get_image_features(pixels, grids).pooler_output
    features = BaseModelOutputWithPooling(pooler_output=tuple(one for one in features for _ in range(each)))
    out = model(input_ids=ids, position_ids=positions.expand(-1, len(ids), -1), labels=labels,
                mm_encoder_outputs={"image": features}, output_hidden_states=True, use_cache=False)  # fmt: skip
    return out.loss, out.hidden_states[len(model.model.language_model.layers) // 2][::each, image]


def train(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, pool: Pool, out: Path, *, steps: int,
    batch: int, each: int, seed: int = 0, workers: int = 2, save_every: int = 1000, log_every: int = 50,
) -> torch.nn.Module:  # fmt: skip
    """Train `model` where it is; returns the running average of its weights. Goes on from `out/state.pt`, if any.

    A step is `batch` pictures with `each` prompts. Muon (https://kellerjordan.github.io/posts/muon/) for the matrices
    inside blocks and layers, AdamW for the rest. `out/log.jsonl` has a line per `log_every` steps.
    """
    device, began, first, losses = model.train().device, time.time(), 0, []
    out.mkdir(parents=True, exist_ok=True)
    guide = Guide(model.config.text_config.hidden_size).to(device)
    mean = AveragedModel(model, avg_fn=lambda old, new, n: old.lerp(new, (9 / (n + 10)).clamp(min=1 - AVERAGED)))
    towers = (model.model.visual.blocks, model.model.language_model.layers)
    inside = [weight for tower in towers for weight in tower.parameters() if weight.ndim == 2]
    rest = [weight for weight in [*model.parameters(), *guide.parameters()] if all(weight is not w for w in inside)]
    muon = torch.optim.Muon(inside, PEAK, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": [w for w in rest if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
                               {"params": [w for w in rest if w.ndim < 2], "weight_decay": 0.0}],
                              PEAK, betas=(0.9, 0.98), fused=True)  # fmt: skip
    parts = {"model": model, "guide": guide, "mean": mean, "muon": muon, "adamw": adamw}
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        first = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    data = Prompts(pool.things, processor, batch, each, seed + first)
    loader = DataLoader(data, None, num_workers=workers, collate_fn=dict, prefetch_factor=8 if workers else None)
    generator = torch.Generator(device).manual_seed(seed + first)
    for step, item in zip(range(first, steps), loader, strict=False):
        images = pool.images[item["photo"]][item["picks"]].to(device)
        images = disturb(take(images, item["crops"], item["size"]), generator)
        pictures = processor.image_processor(list(images), do_resize=False, do_rescale=False, return_tensors="pt")
        ids, labels, kinds, boxes = (item[name].to(device) for name in ("input_ids", "labels", "kinds", "boxes"))
        rate = learning_rate(step / steps)
        for group in muon.param_groups + adamw.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16):
            grids = pictures["image_grid_thw"].to(device)
            loss, states = forward(model, pictures["pixel_values"].to(device), grids, ids, labels)
        guide_loss = guide.loss(states, kinds, boxes)
        (loss + max(0.0, 1 - step / steps / GUIDED) * guide_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        mean.update_parameters(model)
        losses.append(torch.stack([loss.detach(), guide_loss.detach()]))
        if (step + 1) % log_every == 0:
            loss, guide_loss = torch.stack(losses).mean(0).tolist()
            line = {"step": step + 1, "questions": (step + 1) * batch * each, "loss": round(loss, 4),
                    "guide": round(guide_loss, 4), "rate": round(rate, 8), "seconds": round(time.time() - began, 1)}
            with open(out / "log.jsonl", "a") as file:
                print(json.dumps(line), file=file)
            losses.clear()
        if (step + 1) % save_every == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1, **state}, out / "state.part")
            (out / "state.part").rename(out / "state.pt")
    return mean.module.eval()


def separate(model: Qwen2VLForConditionalGeneration, unwritten: int, seed: int = 0, length: float = 1.5) -> int:
    """Give the tokens that no completion of the training held rows of their own in the head; returns how many.

    Training only ever pushes them down, all in the same direction, and so their rows become one. LoRA leaves the head
    as it is, so a model fine-tuned on this base could hardly write "no nutrition table" or a capital letter: each such
    token was as likely as hundreds of others. A random vector of `length` at right angles to the shared row (that of
    the token `unwritten`) is added to each. All other rows stay as they are.
    """
    head = model.lm_head.weight.data.float()
    shared = F.normalize(head[unwritten], dim=0)
    rows = F.cosine_similarity(head, shared[None]) > 0.99
    own = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)).to(head.device)
    own = F.normalize(own - (own @ shared)[:, None] * shared, dim=1)
    head[rows] += length * own[rows]
    model.lm_head.weight.data = head.to(model.lm_head.weight.dtype)
    return int(rows.sum())


def retrain(
    out: str | Path, *, steps: int = 12_200, batch: int = 128, each: int = 3, scenes: int = 28_000, seed: int = 0,
    workers: int = 2, checked: int = 600,
) -> dict:  # fmt: skip
    """From random weights to a model folder `out`; returns its scores, which are also in `out/scores.json`.

    The defaults are those of the shipped weights. Scores are of `checked` prompts about the pictures of val.
    """
    processor = make_processor()
    model = make_model(processor.tokenizer, seed).to("cuda" if torch.cuda.is_available() else "cpu")
    pool, val = load_pool("base", scenes, workers), load_pool("val", min(checked, SPLITS["val"]), workers)
    model = train(model, processor, pool, Path(out), steps=steps, batch=batch, each=each, seed=seed, workers=workers)
    separate(model, processor.tokenizer.convert_tokens_to_ids("<|video_pad|>"))
    save(model, processor, out)
    prompts = {"things": check.thing_prompts(val, checked), "zero_shot": check.table_prompts(val)[:checked]}
    scores = {name: check.score(some, check.generate(model, processor, val, some)) for name, some in prompts.items()}
    (Path(out) / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder of the model, its log and its checkpoint")
    for name, option in list(inspect.signature(retrain).parameters.items())[1:]:
        parser.add_argument(f"--{name}", type=int, default=option.default)
    print(json.dumps(retrain(**vars(parser.parse_args())), indent=1))
