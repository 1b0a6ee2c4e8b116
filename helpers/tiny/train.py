"""Trains the tiny base from random weights: batches of questions, the loss, the loop."""

import functools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers.tiny.pictures import Pool, disturb, model_size, patches, random_crop, take
from helpers.tiny.questions import NAMES, by_name, cropped, question

WHOLE = np.array([0.0, 0.0, 1.0, 1.0])


class Questions(IterableDataset):
    """Batches of questions about the scenes of a pool; every worker draws its own, from the seed and its number.

    Yields dicts: photo (height, width), picks [B] indices into the pool, crops [B, 4], size (height, width) that the
    model sees, input_ids [B * k, L], labels [B * k, L] (-100 outside the answer and its end token): k questions a
    picture, one after the other; kinds [B, N] and boxes [B, N, 4] for the guide. All pictures of a batch have one
    size; seven of ten batches are cropped.
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
            crop_batch, crops, texts, maps = rng.random() < 0.7, [], [], []
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
    ids = torch.full((len(texts), math.ceil(max(lengths) / 16) * 16), processor.tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (a, b) in enumerate(zip(asked, told, strict=True)):
        ids[i, : lengths[i]] = torch.tensor(a + b)
        labels[i, len(a) : lengths[i]] = torch.tensor(b)
    return {"input_ids": ids, "labels": labels}


def picture_features(visual: torch.nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The vision tower on B pictures of one size as one batch: pixels [B, P, 1176] -> image tokens [B, P / 4, width].

    The same numbers as `visual(...)`, which walks through the pictures one by one (a test compares them).
    """
    batch, count, _ = pixels.shape
    x = F.linear(pixels, visual.patch_embed.proj.weight.flatten(1))  # a convolution whose stride is its size
    cos, sin = rotary(visual, grid)
    for block in visual.blocks:
        x = vision_block(block, x, cos, sin)
    return visual.merger(x.reshape(batch * count, -1)).reshape(batch, count // 4, -1)


def vision_block(block: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One block on pictures of one size, x [B, P, width]; cos and sin [P, head size]."""
    attn, (batch, count, _) = block.attn, x.shape
    q, k, v = attn.qkv(block.norm1(x)).reshape(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q.float(), k.float()))
    mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    x = x + attn.proj(mixed.transpose(1, 2).reshape(batch, count, -1))
    return x + block.mlp(block.norm2(x))


def language_layer(layer: torch.nn.Module, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One layer on sequences padded on the right, states [B, L, width]."""
    return layer(states, attention_mask=None, position_embeddings=(cos, sin))


def compile_layers() -> None:
    """Let torch fuse the many small operations of a block and of a layer: about twice as fast on a GPU.

    Each is compiled once, for any size of picture and length of text; where compiling fails, torch runs them as before.
    """
    global vision_block, language_layer
    torch._dynamo.config.suppress_errors = True
    vision_block = torch.compile(vision_block, dynamic=True)
    language_layer = torch.compile(language_layer, dynamic=True)


def rotary(visual: torch.nn.Module, grid: torch.Tensor, theta: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [P, head size] of the vision tower's two-dimensional rotary positions, patches in groups of 2 x 2."""
    _, rows, columns = grid.tolist()
    device, quarter = visual.patch_embed.proj.weight.device, visual.blocks[0].attn.head_dim // 4
    where = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).to(device)
    where = where.reshape(rows // 2, 2, columns // 2, 2, 2).transpose(1, 2).reshape(-1, 2).float()
    turns = theta ** -(torch.arange(quarter, device=device) / quarter)
    angle = (where[:, :, None] * turns).flatten(1).repeat(1, 2)
    return angle.cos(), angle.sin()


def on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on `device`, copied there without waiting for the work that the GPU still has to do."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def forward(
    model: torch.nn.Module, pixels: torch.Tensor, size: tuple[int, int], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model on B pictures of one size with k questions each, `ids` [B * k, L] padded on the right.

    Returns the logits [B * k, L, vocabulary] and, half-way up the language model, the states of each picture's image
    tokens [B, N, width]. A test compares the logits with those of `model(...)`, which is slower for many pictures.
    """
    grid, core = torch.tensor([1, size[0] // 14, size[1] // 14]), model.model
    row, ids = ids[:1].cpu(), on(pixels.device, ids)
    kinds = (row == model.config.image_token_id).int()
    start = int(kinds[0].argmax())  # the same in every row
    states, features = core.get_input_embeddings()(ids), picture_features(core.visual, pixels, grid)
    each, count = len(ids) // len(features), features.shape[1]
    features = features.repeat_interleave(each, 0).to(states.dtype)
    states = torch.cat([states[:, :start], features, states[:, start + count :]], 1)
    positions, _ = core.get_rope_index(row, mm_token_type_ids=kinds, image_grid_thw=grid[None])
    language = core.language_model
    cos, sin = language.rotary_emb(states, on(pixels.device, positions))
    for number, layer in enumerate(language.layers, start=1):
        states = language_layer(layer, states, cos, sin)
        if number == len(language.layers) // 2:
            middle = states[::each, start : start + count]
    return model.lm_head(language.norm(states)), middle


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, over the answers and their end tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


class Guide(torch.nn.Module):
    """A crutch for the first part of the training, thrown away after it: what lies under each image token, and where.

    Without it the model writes well-formed boxes that ignore the picture for thousands of steps: the answers alone
    say too little about where to look. From the states [B, N, width] half-way up the language model it reads the
    kind of thing (0 for none) and the thing's box (x0, y0, x1, y1 in 0-1) under each image token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.out = torch.nn.LayerNorm(width), torch.nn.Linear(width, 1 + len(NAMES) + 4)

    def loss(self, states: torch.Tensor, kinds: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """`kinds` [B, N] whole numbers, `boxes` [B, N, 4]; cross-entropy plus five times the boxes' mean error."""
        read = self.out(self.norm(states.float()))
        inside = (kinds > 0).float()
        error = (read[..., -4:].sigmoid() - boxes).abs().mean(-1)
        wrong = F.cross_entropy(read[..., :-4].flatten(0, 1), kinds.flatten())
        return wrong + 5 * (error * inside).sum() / inside.sum().clamp(min=1)


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


def learning_rate(progress: float, peak: float, rise: float = 0.04) -> float:
    """One cycle over `progress` 0-1: up in a straight line to `peak`, then down along a cosine to 1 % of it."""
    if progress < rise:
        return peak * (0.01 + 0.99 * progress / rise)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise))))


def train(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, pool: Pool, out: str | Path, *,
    steps: int, batch: int = 64, each: int = 4, peak: float = 1e-3, guided: float = 0.5, decay: float = 0.999,
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
                    "guide": round(guide, 4), "rate": round(learner.rate, 8),
                    "seconds": round(time.time() - began, 1)}  # fmt: skip
            with open(Path(out) / "log.jsonl", "a") as file:
                print(json.dumps(line), file=file)
            losses.clear()
        if (step + 1) % save_every == 0:
            learner.save(Path(out) / "state.pt", step + 1)
    model.load_state_dict(learner.mean, strict=False)
    return model.eval()


class Learner:
    """Model, guide, optimizers and the running average of the weights: one step, saved and restored together.

    Muon (https://kellerjordan.github.io/posts/muon/) for the matrices inside blocks and layers, AdamW for the rest.
    """

    def __init__(self, model: torch.nn.Module, peak: float, decay: float, guided: float):
        self.model, self.peak, self.decay, self.guided, self.rate = model, peak, decay, guided, 0.0
        self.device = next(model.parameters()).device.type
        self.guide = Guide(model.config.text_config.hidden_size).to(self.device)
        self.mean = {name: value.detach().clone() for name, value in model.named_parameters()}
        hidden = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and ("blocks." in name or "layers." in name)}
        weights = [*model.parameters(), *self.guide.parameters()]
        others = [p for p in weights if id(p) not in hidden]
        groups = [{"params": [p for p in others if (p.ndim > 1) is many], "weight_decay": decay}
                  for many, decay in ((True, 0.05), (False, 0.0))]  # fmt: skip
        self.optimizers = [
            torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=self.device != "cpu"),
            torch.optim.Muon([p for p in weights if id(p) in hidden], lr=peak, weight_decay=0.05,
                             adjust_lr_fn="match_rms_adamw"),
        ]  # fmt: skip
        self.steps = 0

    def step(self, pixels: torch.Tensor, item: dict, progress: float) -> torch.Tensor:
        """One update at `progress` (0-1) of the training; the answers' and the guide's loss [2]."""
        labels, kinds, boxes = (on(pixels.device, item[key]) for key in ("labels", "kinds", "boxes"))
        with torch.autocast(pixels.device.type, torch.bfloat16):
            logits, middle = forward(self.model, pixels, item["size"], item["input_ids"])
        answer, guide = answer_loss(logits, labels), self.guide.loss(middle, kinds, boxes)
        self.rate = learning_rate(progress, self.peak)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = self.rate
        (answer + max(0.0, 1 - progress / self.guided) * guide).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        weight = 1 - min(self.decay, self.steps / (self.steps + 9))
        torch._foreach_lerp_(list(self.mean.values()), [p.detach() for p in self.model.parameters()], weight)
        return torch.stack([answer.detach(), guide.detach()])

    def _parts(self) -> dict:
        return {"model": self.model.state_dict(), "guide": self.guide.state_dict(), "mean": self.mean,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}  # fmt: skip

    def save(self, path: Path, step: int) -> None:
        """Write everything to `path`, whole or not at all."""
        torch.save({"step": step, **self._parts()}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def restore(self, path: Path) -> int:
        """Read what `save` wrote; the number of steps already done, 0 without a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.device, weights_only=True)
        for part in ("model", "guide"):
            getattr(self, part).load_state_dict(state[part])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state["mean"].items():
            self.mean[name].copy_(value)
        self.steps = state["step"]
        return self.steps
