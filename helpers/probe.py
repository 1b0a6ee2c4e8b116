"""A look inside a running model: what each part of a training step costs, and where attention goes in the picture."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from peft import PeftModel
from PIL.Image import Image
from torch import nn

from helpers.data.pictures import as_rgb
from helpers.messages import parse_text
from helpers.sizes import part_of

Shape = tuple[int, ...]


@torch.inference_mode()
def shapes(
    model: nn.Module, batch: dict[str, torch.Tensor], places: Mapping[str, tuple[nn.Module, str]]
) -> dict[str, Shape]:
    """Shapes seen in one forward pass: `places` are name -> (module, "in" or "out"), of its first tensor."""
    seen, handles = {}, []
    for name, (module, side) in places.items():

        def note(module, inputs, output, name=name, side=side):
            first = inputs if side == "in" else output
            seen[name] = tuple((first[0] if isinstance(first, tuple) else first).shape)

        handles.append(module.register_forward_hook(note))
    model(**batch)
    for handle in handles:
        handle.remove()
    return {name: seen[name] for name in places}


PARTS = ("vision: patch embedding", "vision: blocks", "vision: merger", "language: layers", "head")
REST = "everything else"


def step_costs(model: nn.Module, batch: dict[str, torch.Tensor], repeats: int = 3) -> dict[str, dict[str, float]]:
    """Seconds and memory of one training step by part: `{part: {"forward", "backward" (s), "kept" (bytes)}}`.

    `model` is a Qwen2-VL, with LoRA or without, `batch` a collated one. Times are the median of `repeats` steps after
    one that is not counted, in bf16 autocast, without an optimizer. "kept" is what the forward pass leaves in memory
    for the backward pass, without the weights themselves. A part's backward ends where the gradient reaches the part
    before it. "everything else" holds embeddings, masks, norms between the parts, and the loss. The model must not use
    gradient checkpointing, which runs parts twice.
    """
    runs = [_one_step(model, batch) for _ in range(repeats + 1)][1:]
    return {part: {kind: median(run[part][kind] for run in runs) for kind in ("forward", "backward", "kept")}
            for part in (*PARTS, REST)}  # fmt: skip


def _one_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    costs = {part: {"forward": 0.0, "backward": 0.0, "kept": 0.0} for part in (*PARTS, REST)}
    marks: list[tuple[float, str]] = []  # when the gradient reached the output of a part
    running, held = [REST], {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    on_gpu = next(model.parameters()).is_cuda

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            held.add(storage.data_ptr())
            costs[running[-1]]["kept"] += storage.nbytes()
        return tensor

    with ExitStack() as stack:
        for part, module in _units(model):
            stack.enter_context(_timed(part, module, running, costs, marks, now))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        start = now()
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            loss = model(**batch).loss
        done = now()
        loss.backward()
        end = now()
    costs[REST]["forward"] = done - start - sum(cost["forward"] for cost in costs.values())
    for (begin, part), (stop, _) in zip([(done, REST), *marks], [*marks, (end, REST)], strict=True):
        costs[part]["backward"] += stop - begin
    model.zero_grad()
    return costs


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that run one after the other, each with its part."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tower, language = base.model.visual, base.model.language_model
    units = [tower.patch_embed, *tower.blocks, tower.merger, *language.layers, base.lm_head]
    names = {module: name for name, module in base.named_modules()}
    return ((part_of(names[module]), module) for module in units)


@contextmanager
def _timed(part: str, module: nn.Module, running: list, costs: dict, marks: list, now) -> Iterator[None]:
    """Hooks on one module: its forward time, and a mark when the gradient reaches its output."""
    started = []

    def before(*_) -> None:
        running.append(part)
        started.append(now())

    def after(module, inputs, output) -> None:
        costs[part]["forward"] += now() - started.pop()
        running.pop()
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(lambda gradient: marks.append((now(), part)))

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


COORDINATES = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True, eq=False)
class Look:
    """One answer, and where the model looked while it wrote the first box."""

    text: str
    boxes: np.ndarray  # float64 [N, 4] x-first in 0-1
    maps: np.ndarray  # float32 [layers, 4, rows, columns]: attention to each image token, mean of the heads
    # for each of x0, y0, x1, y1; a map sums to the share of all attention that goes to the picture


@torch.inference_mode()
def look(model: nn.Module, processor, image: Image, prompt: str, max_new_tokens: int = 64) -> Look | None:
    """Ask about one picture and read the attention of the tokens that choose a coordinate; None without a whole box.

    A number's first digit is chosen at the token before it, "(" or ","; its attention is taken, in a second pass over
    question and answer. The model must have been loaded with `attn_implementation="eager"`: others compute no weights.
    """
    if model.config._attn_implementation != "eager":
        raise ValueError(f"attention is {model.config._attn_implementation}; load the model with eager, or there are "
                         "no weights to look at.")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[as_rgb(image)], text=[text], return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    pieces = [processor.tokenizer.decode([token]) for token in ids[0].tolist()]
    answer = "".join(pieces[length:])
    places = coordinate_places(pieces, length)
    if len(places) < 4:
        return None
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids),
               "mm_token_type_ids": (ids == model.config.image_token_id).int()}  # fmt: skip
    attentions = model(**inputs, output_attentions=True, logits_to_keep=1).attentions  # layers x [1, heads, T, T]
    merge = model.config.vision_config.spatial_merge_size
    rows, columns = (inputs["image_grid_thw"][0, 1:] // merge).tolist()
    seen = ids[0] == model.config.image_token_id
    maps = torch.stack([layer[0, :, places[:4]].float().mean(0)[:, seen] for layer in attentions])
    boxes = parse_text(answer).boxes_xyxy_unit
    return Look(answer, boxes, maps.reshape(len(maps), 4, rows, columns).cpu().numpy())


def coordinate_places(pieces: list[str], start: int = 0) -> list[int]:
    """Where each number of an answer is chosen: the place before its first digit, from the first "(" after `start`."""
    opened = next((i for i in range(start, len(pieces)) if "(" in pieces[i]), len(pieces))
    digit = [re.search(r"\d", piece) is not None for piece in pieces]
    return [i - 1 for i in range(opened + 1, len(pieces)) if digit[i] and not digit[i - 1]]


def inside(box: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """float64 [rows, columns]: the share of each cell of the picture that `box` [4] (x-first in 0-1) covers."""
    x0, y0, x1, y1 = box
    across = [np.clip((high * n - np.arange(n)), 0, 1) - np.clip((low * n - np.arange(n)), 0, 1)
              for low, high, n in ((y0, y1, rows), (x0, x1, columns))]  # fmt: skip
    return np.outer(*across)


def lift(look: Look, box: np.ndarray) -> np.ndarray:
    """float [layers, 4]: how much more attention a token of `box` gets than an average one of the picture."""
    cover = inside(box, *look.maps.shape[2:])
    return (look.maps * cover).sum((2, 3)) / look.maps.sum((2, 3)) / cover.mean()


def centre(maps: np.ndarray) -> np.ndarray:
    """float [..., 2]: the centre of attention (x, y in 0-1) of maps [..., rows, columns]."""
    maps = maps / maps.sum((-1, -2), keepdims=True)
    ys, xs = ((np.arange(n) + 0.5) / n for n in maps.shape[-2:])
    return np.stack([(maps.sum(-2) * xs).sum(-1), (maps.sum(-1) * ys).sum(-1)], axis=-1)


def edge_distances(looks: list[Look], layer: int) -> dict[str, dict[str, float]]:
    """While writing each coordinate: mean distance (0-1) from the centre of attention to each edge that was written."""
    centres = np.array([centre(look.maps[layer]) for look in looks])  # [n, 4, 2]
    written = np.array([look.boxes[0] for look in looks])  # [n, 4]
    return {name: {edge: float(np.abs(centres[:, i, j % 2] - written[:, j]).mean())
                   for j, edge in enumerate(COORDINATES)} for i, name in enumerate(COORDINATES)}  # fmt: skip
