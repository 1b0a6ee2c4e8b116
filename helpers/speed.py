"""Everything that only makes training faster: LoRA in fewer passes, compiled parts, kept activations, cached features.

PEFT's LoRA makes the base's output, LoRA's output, LoRA's scaled output and the sum, each as large as the layer's own.
Here LoRA's product is added to the base's output in place (`addmm_`), forward and backward, as in Unsloth's kernels
(https://github.com/unslothai/unsloth). Norms, activations and rotations are compiled. All of it is equal to the plain
way up to rounding; dropout is PEFT's, one mask a layer.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import MethodType

import datasets
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._triton import has_triton
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2MLP, Qwen2VLRMSNorm, VisionMlp

from helpers.collate import IGNORED, Collator
from helpers.model import free_memory, gpus, linear_4bit
from helpers.recipes import Stage
from helpers.runs import progress_bar

RESERVE = 0.08  # of a GPU's memory, for what a step that is tried does not show
ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")  # functions of transformers' module
PADDING = {"input_ids": None, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}  # None: the tokenizer's


def speed_up(tuned: nn.Module) -> str:
    """Add LoRA in place and compile what stands between matrix products, where that pays; says what was done.

    `TORCHDYNAMO_DISABLE=1` in the environment is PyTorch's own switch against compiling.
    """
    places = {str(place) for place in (getattr(tuned, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        return "nothing is fused or compiled: that pays with a model on one GPU"
    lora = "LoRA is added in place" if fuse_lora(tuned) else "there is no LoRA to fuse"
    if not torch.cuda.is_available():
        return f"{lora}; nothing is compiled: that pays on a GPU"
    if not _can_compile():
        return f"{lora}; nothing is compiled, as Triton, a C compiler or Python's headers are missing"
    compile_between(tuned)
    return f"{lora}; what stands between the matrix products is compiled"


class LoraProduct(torch.autograd.Function):
    """x W' + bias + scale * dropout(x) A' B', for a frozen W, quantized to NF4 or not.

    x [..., inputs]; A [rank, inputs] and B [outputs, rank] in fp32, used in x's dtype; W is `base`'s. It is dequantized
    anew for the backward pass, so that only x, dropout's mask and a [rows, rank] product are kept.
    """

    @staticmethod
    def forward(ctx, x, a, b, base, scale, p):
        rows, a, b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        dropped, mask = torch.native_dropout(rows, p, True) if p else (rows, None)
        out = nn.functional.linear(rows, plain_weight(base, x.dtype), None if base.bias is None else base.bias.to(x))
        low = dropped @ a.T
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(rows, mask, low, a, b)
        ctx.base, ctx.scale, ctx.keep, ctx.shape = base, scale, 1 / (1 - p), x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        rows, mask, low, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        up = (gradient @ b).mul_(ctx.scale)
        of_b = (gradient.T @ low).mul_(ctx.scale)
        of_a = up.T @ (rows if mask is None else torch.ops.aten.native_dropout_backward(rows, mask, ctx.keep))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ plain_weight(ctx.base, gradient.dtype)
            if mask is None:
                of_x.addmm_(up, a)
            else:
                of_x += torch.ops.aten.native_dropout_backward(up @ a, mask, ctx.keep)
            of_x = of_x.view(ctx.shape)
        return of_x, of_a.float(), of_b.float(), None, None, None


def plain_weight(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The layer's weight [outputs, inputs] in `dtype`, dequantized where it is NF4."""
    state = getattr(layer.weight, "quant_state", None)
    return (layer.weight if state is None else dequantize_4bit(layer.weight, state)).to(dtype)


def _lora_forward(self: LoraLayer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The forward pass of a LoRA layer; PEFT's own where there is not exactly one adapter to add."""
    if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    (name,), kind = self.active_adapters, x.device.type
    x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    p = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
    return LoraProduct.apply(x, self.lora_A[name].weight, self.lora_B[name].weight, self.get_base_layer(),
                             self.scaling[name], p)


def fuse_lora(tuned: nn.Module) -> int:
    """Give every LoRA layer of a model the pass above, and return how many there are; plain LoRA on linear layers."""
    layers = [layer for layer in tuned.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.forward = MethodType(_lora_forward, layer)
    return len(layers)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """In fp32, as under autocast, and rounded to x's dtype, as the layer behind it would."""
    return nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def compile_between(vlm: nn.Module) -> None:
    """Compile what stands between the matrix products of a Qwen2-VL; needs Triton and a C compiler.

    Rotations are replaced in transformers' module, for all models of this process, until `plain_rotations`.
    """
    for name in ROTATIONS:
        plain = getattr(modeling_qwen2_vl, name)
        if not hasattr(plain, "_torchdynamo_orig_callable"):
            setattr(modeling_qwen2_vl, name, torch.compile(plain, dynamic=True))
    gated, layer_norm = torch.compile(_gated, dynamic=True), torch.compile(_layer_norm, dynamic=True)
    for module in vlm.modules():
        if isinstance(module, Qwen2MLP):
            module.forward = MethodType(
                lambda self, x: self.down_proj(gated(self.gate_proj(x), self.up_proj(x))), module)
        elif isinstance(module, nn.LayerNorm):
            module.forward = MethodType(lambda self, x: layer_norm(x, self.weight, self.bias, self.eps), module)
        elif isinstance(module, VisionMlp):
            module.act.compile(dynamic=True)
        elif isinstance(module, Qwen2VLRMSNorm):
            module.compile(dynamic=True)


def plain_rotations() -> None:
    """Give transformers' module its own rotations back: a model that generates then does so as it would anywhere."""
    for name in ROTATIONS:
        now = getattr(modeling_qwen2_vl, name)
        setattr(modeling_qwen2_vl, name, getattr(now, "_torchdynamo_orig_callable", now))


def _can_compile() -> bool:
    """Whether Triton is there and can build its driver, which takes a C compiler and Python's headers."""
    if not has_triton():
        return False
    try:
        from triton.runtime.driver import driver

        driver.active.get_current_target()
    except Exception:  # its own, the compiler's, the dynamic linker's
        return False
    return True


def checkpointing(vlm: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[bool, list[nn.Module]]:
    """Whether activations must be recomputed, and the layers that can keep theirs all the same (`KeepActivations`).

    Training steps on `batch`, the longest there is, are tried. Gradients of earlier micro-batches, AdamW's two numbers
    a weight and a reserve must fit beside. Where not all layers can keep their activations, a
    few of each tower that gradients pass through are tried, the language model's first; then as many as the memory
    allows, in the order they run, and these together: one tower's peak may have hidden the other's. Half of them where
    that does not fit; none with several GPUs in one process. Without a GPU: False.
    """
    if not torch.cuda.is_available():
        return False, []
    took, room = _peak(vlm, batch), _room()
    allowed, takes = (1 - RESERVE) * room, f"takes {took / 2**30:.1f} GiB" if took < math.inf else "does not fit"
    print(f"a step of {len(batch['labels'])} pictures {takes} with its activations kept, of {room / 2**30:.1f} GiB: "
          f"gradient checkpointing is {'off' if took < allowed else 'on'}")
    if took < allowed or len(gpus()) > 1:
        return took >= allowed, []
    base = vlm.get_base_model() if isinstance(vlm, PeftModel) else vlm
    towers = [base.model.language_model.layers, base.model.visual.blocks]

    def with_kept(layers: Sequence[nn.Module]) -> float:
        base.activation_checkpointing_enable()
        for layer in layers:
            layer.gradient_checkpointing = False
        return _peak(vlm, batch)

    took, few = with_kept([]), 2
    kept, left = [], allowed - took
    for layers in towers if any(weight.requires_grad for weight in base.model.visual.parameters()) else towers[:1]:
        each = (with_kept(layers[:few]) - took) / few
        count = min(len(layers), max(0, int(left / each))) if 0 < each < math.inf else 0
        if count:
            kept, left = [*kept, *layers[:count]], left - count * each
    while kept and with_kept(kept) > allowed:
        kept = kept[: len(kept) // 2]
    base.activation_checkpointing_disable()
    print(f"{len(kept)} of {sum(map(len, towers))} layers keep their activations all the same")
    return True, kept


def _room() -> float:
    """Bytes that this process may take, or has taken, of the smallest of its GPUs: others may use them too."""
    allowed = torch.cuda.get_per_process_memory_fraction
    return min(min(torch.cuda.get_device_properties(device).total_memory * allowed(device),
                   torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) for device in gpus())


def _peak(vlm: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The most bytes that a training step on `batch` takes of a GPU, gradients and AdamW included; inf: too many."""
    devices, was_training = gpus(), vlm.training
    each = 16 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 12  # bytes a weight; DDP holds gradients once more
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        given = {name: tensor.to(vlm.device) for name, tensor in batch.items()}
        labels, base = given.pop("labels"), vlm.get_base_model() if isinstance(vlm, PeftModel) else vlm
        with torch.autocast("cuda", torch.bfloat16):
            vlm.train()
            hidden = base.model(**given, use_cache=False).last_hidden_state  # may end on another GPU than it began
            base.lm_head(hidden[(labels != IGNORED).to(hidden.device)]).sum().backward()
        took = max(torch.cuda.max_memory_allocated(device) for device in devices)
    except torch.OutOfMemoryError:
        took = math.inf
    vlm.train(was_training).zero_grad()
    free_memory()
    for device in devices:  # a run's own peak is not this trial's
        torch.cuda.reset_peak_memory_stats(device)
    return took + each * sum(weight.numel() for weight in vlm.parameters() if weight.requires_grad) / len(devices)


class KeepActivations(TrainerCallback):
    """Takes `layers` out of gradient checkpointing when the training begins."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def on_train_begin(self, *args, **kwargs) -> None:
        for layer in self.layers:
            layer.gradient_checkpointing = False


def worth_caching(stage: Stage, augment: bool, epochs: float) -> bool:
    """Whether a frozen tower encodes pictures more than once, always alike, in one process (each would encode all)."""
    frozen = "vision" not in stage.towers
    return frozen and not augment and epochs > 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1


class CachedFeaturesCollator:
    """Batches of rows whose pictures are encoded already: no picture is opened any more, the vision tower does not run.

    For stages whose tower does not train (r1, r3's second) and pictures that stay as they are. The numbers are those
    of a training step, to the last bit.

    Args:
        collator: makes tokens and labels, without augmentation.
        vlm: a Qwen2-VL whose vision tower is frozen.
        rows: what batches are made of, by `image_id`. `self.rows` are the same ones, their pictures left undecoded.
        file: where the features go as long as this process runs: hidden size x image tokens of each picture
            (9 MB at 7B and 1280 tokens). It has no name any more once it is whole: no kill leaves it behind.
        batch_size: of a training step. A matrix product rounds otherwise for a single picture than for several.

    Calling it with N rows returns what `Collator` returns, with `image_features` ([image tokens, hidden]) in the
    place of `pixel_values`: `BoxTrainer` hands them to the model.
    """

    def __init__(self, collator: Collator, vlm: nn.Module, rows: datasets.Dataset, file: Path, batch_size: int):
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.pad = collator.processor.tokenizer.pad_token_id
        self.ready: dict[str, dict[str, torch.Tensor]] = {}  # image_id -> tensors of one row, without padding
        self.places: dict[str, slice] = {}  # image_id -> rows of `self.features`
        ids, end, width = iter(rows["image_id"]), 0, vlm.config.text_config.hidden_size
        bar = progress_bar(len(rows), 0, "caching vision features", "picture")
        workers = 4 if torch.cuda.is_available() else 0  # processes that open pictures
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            for batch in DataLoader(rows, batch_size, collate_fn=collator, num_workers=workers):
                encoded = vision_features(vlm, batch["pixel_values"], batch["image_grid_thw"])
                for number, tokens in enumerate(encoded):
                    real, image_id = batch["attention_mask"][number].bool(), next(ids)
                    self.ready[image_id] = {name: batch[name][number][real].clone() for name in PADDING}
                    self.ready[image_id]["image_grid_thw"] = batch["image_grid_thw"][number]
                    self.places[image_id] = slice(end, end := end + len(tokens))
                    out.write(tokens.cpu().view(torch.uint8).numpy().tobytes())
                bar.update(len(encoded))
        bar.close()
        self.features = torch.from_file(str(file), size=end * width, dtype=tokens.dtype).view(end, width)
        file.unlink()

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        ready = [self.ready[row["image_id"]] for row in rows]
        batch = {name: pad_sequence([one[name] for one in ready], True, self.pad if value is None else value)
                 for name, value in PADDING.items()}  # fmt: skip
        batch["image_grid_thw"] = torch.stack([one["image_grid_thw"] for one in ready])
        batch["image_features"] = torch.cat([self.features[self.places[row["image_id"]]] for row in rows])
        return batch


def for_sampling(base: nn.Module) -> nn.Module:
    """A frozen Qwen2-VL made faster on a CPU for a training that samples, in two ways; a GPU gains nothing by them.

    Weights in NF4 are dequantized once, not for each token. And the vision tower encodes each picture of a call once,
    and none that it knows from the call before: rewards take several completions of a picture, and pass it through the
    model three times for each. Where a call has a new picture, all of that call are encoded together, so that what
    rounding gives does not depend on earlier calls.
    """
    if torch.cuda.is_available():
        return base
    base = base.dequantize() if linear_4bit(base) else base
    core, known = base.model, {}
    encode = core.get_image_features

    def get_image_features(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **options):
        pictures = pixel_values.split(image_grid_thw.prod(-1).tolist())
        keys = [hashlib.sha1(patches.cpu().numpy()).digest() for patches in pictures]
        if not known.keys() >= set(keys):
            known.clear()
            first = [keys.index(key) for key in dict.fromkeys(keys)]
            made = encode(torch.cat([pictures[i] for i in first]), image_grid_thw[first], **options)
            known.update((keys[i], features) for i, features in zip(first, made.pooler_output, strict=True))
        return BaseModelOutputWithPooling(pooler_output=tuple(known[key] for key in keys))

    core.get_image_features = get_image_features
    return base


@torch.no_grad()
def vision_features(vlm: nn.Module, pixel_values: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the vision tower makes of N pictures in a training step: N tensors [image tokens, hidden]."""
    with torch.autocast(vlm.device.type, torch.bfloat16, enabled=vlm.dtype == torch.bfloat16):
        return vlm.get_image_features(pixel_values.to(vlm.device), grids.to(vlm.device)).pooler_output
