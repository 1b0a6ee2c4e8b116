"""What the parts of a model weigh and cost, by arithmetic: parameters, LoRA's own, bytes at a precision, operations.

Works on the meta device too, where 7B takes no memory. Each number has a measured one to stand beside it: `held_bytes`
for bytes, PyTorch's FlopCounterMode for operations, PEFT's own count for LoRA.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
from torch import nn

from helpers.model import count, tower_of
from helpers.recipes import Stage

PARTS = {
    "vision: patch embedding": "model.visual.patch_embed",
    "vision: blocks": "model.visual.blocks",
    "vision: merger": "model.visual.merger",
    "language: embeddings": "model.language_model.embed_tokens",
    "language: layers": "model.language_model.layers",
    "language: last norm": "model.language_model.norm",
    "head": "lm_head",
}
BYTES = {"fp32": 4, "bf16": 2, "int8": 2, "nf4": 2}  # of a weight that is not quantised
PRECISIONS = tuple(BYTES)


def part_of(name: str) -> str:
    """The part of `PARTS` that a parameter or module belongs to; PEFT's prefix is allowed."""
    name = name.removeprefix("base_model.model.")
    for part, prefix in PARTS.items():
        if name.startswith(prefix):
            return part
    raise ValueError(f"{name!r} belongs to no part; the parts are {', '.join(PARTS.values())}.")


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Weights in each part of `PARTS`, frozen and trainable together."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += count(parameter)
    return counts


def linear_layers(model: nn.Module, pattern: str = ".*") -> dict[str, tuple[int, int]]:
    """`{name: (inputs, outputs)}` of the linear layers whose whole name `pattern` matches."""
    return {name: (layer.in_features, layer.out_features) for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name)}  # fmt: skip


def lora_weights(model: nn.Module, pattern: str, rank: int) -> int:
    """What LoRA adds on the layers that `pattern` matches: a [rank, inputs] and an [outputs, rank] matrix on each."""
    return sum(rank * (inputs + outputs) for inputs, outputs in linear_layers(model, pattern).values())


def nf4_bytes(weights: int, block: int = 64, double: bool = True) -> int:
    """Bytes of one matrix in NF4: half a byte a weight and one scale a block.

    A scale is an fp32 number; with `double` it is one byte, with an fp32 scale for each 256 of them and one mean.
    """
    blocks = math.ceil(weights / block)
    return math.ceil(weights / 2) + (blocks + 4 * math.ceil(blocks / 256) + 4 if double else 4 * blocks)


def weight_bytes(model: nn.Module, precision: str) -> dict[str, int]:
    """Bytes of a frozen base by tower, held in `fp32`, `bf16`, `int8` or `nf4` (the language model's linear layers).

    `model` is the plain, unquantised one. int8 is bitsandbytes': a byte a weight and an fp32 scale for each output.
    """
    total = {"vision": 0, "language": 0, "head": 0}
    linear = {f"{name}.weight" for name in linear_layers(model) if tower_of(name) == "language"}
    for name, weight in model.named_parameters():
        if precision in ("int8", "nf4") and name in linear:
            n = weight.numel()
            total["language"] += n + 4 * len(weight) if precision == "int8" else nf4_bytes(n)
        else:
            total[tower_of(name)] += BYTES[precision] * weight.numel()
    return total


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that a loaded model's weights take, by tower, the scales of quantised layers included.

    An NF4 model must not have answered yet: bitsandbytes then holds its scales in another form on a CPU.
    """
    total = {"vision": 0, "language": 0, "head": 0}
    for name, weight in model.named_parameters():
        tensors = [weight, getattr(weight, "SCB", None)]  # int8's scales
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.offset, state.state2 and state.state2.absmax]
        total[tower_of(name)] += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return total


def image_tokens(grid: Sequence[int], merge: int = 2) -> int:
    """Image tokens of a picture from its grid of patches (frames, rows, columns): merge x merge patches make one."""
    frames, rows, columns = (int(n) for n in grid)
    return frames * (rows // merge) * (columns // merge)


def forward_flops(model: nn.Module, grid: Sequence[int], tokens: int) -> dict[str, int]:
    """Floating point operations of one forward pass, by part: one picture of `grid` patches in `tokens` tokens.

    A linear layer of n inputs and m outputs takes 2 n m for each row that it sees; attention takes 4 S² d a layer for
    S rows of width d, half for the scores and half for the sum (counted whole, as a mask saves nothing).
    """
    merge = model.config.vision_config.spatial_merge_size
    patches = image_tokens(grid, merge) * merge**2
    rows = {"vision: blocks": patches, "vision: merger": patches // merge**2}
    flops = {part: 0 for part in PARTS if part not in ("language: embeddings", "language: last norm")}
    flops["vision: patch embedding"] = 2 * patches * model.model.visual.patch_embed.proj.weight.numel()
    for name, (inputs, outputs) in linear_layers(model).items():
        flops[part_of(name)] += 2 * inputs * outputs * rows.get(part_of(name), tokens)
    vision, text = model.config.vision_config, model.config.text_config
    flops["vision: blocks"] += vision.depth * 4 * patches**2 * vision.embed_dim
    flops["language: layers"] += text.num_hidden_layers * 4 * tokens**2 * text.hidden_size
    return flops


def training_flops(model: nn.Module, stage: Stage, rank: int, grid: Sequence[int], tokens: int, answer: int,
                   cached: bool = False) -> dict[str, int]:
    """Floating point operations that a step needs for one picture, `{"vision", "language", "head"}`.

    Needed are: the forward pass; the gradient with respect to what goes into a layer, where something before it trains;
    the gradient of weights that train alone. A recomputed activation and the gradient of a frozen weight are not.
    Causal attention counts half of its square, attention's backward pass twice its forward pass, the head the `answer`
    tokens that the loss looks at. `rank` is LoRA's, `cached` says that the frozen tower's work was done before.
    `model` is the plain one, before PEFT. Raises ValueError where `cached` and the vision tower trains.
    """
    if cached and "vision" in stage.towers:
        raise ValueError("the vision tower trains in this stage: what it sees cannot be cached.")
    forward, config = forward_flops(model, grid, tokens), model.config
    patches = image_tokens(grid, config.vision_config.spatial_merge_size) * config.vision_config.spatial_merge_size**2
    seeing = config.vision_config.depth * 4 * patches**2 * config.vision_config.embed_dim
    reading = config.text_config.num_hidden_layers * 4 * tokens**2 * config.text_config.hidden_size
    patching = forward["vision: patch embedding"]
    tower = forward["vision: blocks"] + forward["vision: merger"]
    layers = forward["language: layers"] - reading  # the linear ones
    vision = 0 if cached else patching + tower
    if "vision" in stage.towers:
        vision += tower + seeing  # attention twice, so its square once more
    language = 2 * layers + 3 * reading // 2
    if stage.trains == "full":
        vision += patching + tower - seeing
    else:
        rows = {"vision: blocks": patches, "vision: merger": patches // config.vision_config.spatial_merge_size**2}
        for name, (inputs, outputs) in linear_layers(model, stage.lora_targets).items():
            cost = 3 * 2 * rank * (inputs + outputs) * rows.get(part_of(name), tokens)
            vision, language = (vision + cost, language) if "visual" in name else (vision, language + cost)
    head = 2 * 2 * config.text_config.hidden_size * config.text_config.vocab_size * answer
    return {"vision": vision, "language": language, "head": head}


def rope_angles(rope: dict, head: int) -> dict[str, np.ndarray]:
    """Degrees that each of an axis's frequencies turns by from one position to the next, the fastest first.

    `rope`: a text configuration's `rope_parameters`; `head`: size of an attention head. Of its head / 2 frequencies
    theta ** (-2 i / head) the first section of `mrope_section` goes to time, the next to height, the last to width.
    """
    angles = np.degrees(rope["rope_theta"] ** (-np.arange(0, head, 2) / head))
    parts = np.split(angles, np.cumsum(rope["mrope_section"])[:-1])
    return dict(zip(("time", "height", "width"), parts, strict=True))
