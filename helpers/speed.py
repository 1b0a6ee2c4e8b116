"""Everything that only makes training faster: LoRA in fewer passes, compiled parts, kept activations, cached features.

PEFT's LoRA makes the base's output, LoRA's output, LoRA's scaled output and the sum, each as large as the layer's own.
Here the base's product is added to LoRA's in place (`addmm_`), forward and backward, and dropout is part of LoRA's
first product (`helpers.kernels`), one mask for the layers that share an input. Attention of the vision tower is one
pass over query, key and value in one tensor. Norms, activations and rotations are compiled. All of it is equal to the
plain way up to rounding.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import datasets
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.utils.rnn import pad_sequence
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2MLP, Qwen2VLRMSNorm, VisionAttention, VisionMlp

from helpers.collate import IGNORED, Collator
from helpers.model import free_memory, gpus, linear_4bit
from helpers.recipes import Stage
from helpers.runs import progress_bar

RESERVE = 0.08  # of a GPU's memory, for what a step that is tried does not show
MOST_RANKS = 256  # of the layers that share x, in `helpers.kernels`
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order they are called, with one x
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


def lora_products(x: torch.Tensor, layers: Sequence[nn.Linear], scale: float, p: float, a: Sequence[torch.Tensor],
                  b: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """x W' + bias + scale * dropout(x) A' B' for each of several layers with one x: query, key and value, gate and up.

    x [..., inputs]; every layer's A [rank, inputs] and B [outputs, rank] in fp32, used in x's dtype; W is the layer's
    own, frozen, quantized to NF4 or not. The layers share x's dropout. LoRA's part is made first and W's product added
    to it in place, forward and backward: a large product hides the reading that a small one would wait for. W is
    dequantized anew for the backward pass and the mask made anew from its seed, so that only x and the products
    [rows, rank] are kept.
    """
    first: list[LoraDown] = []
    low, *bs = LoraDown.apply(first, x, scale, p, *a, *b)
    return LoraUp.apply(first[0], x, low, layers, bs, scale, p, *a, *b)


class LoraDown(torch.autograd.Function):
    """LoRA's products with A, and all that the backward pass of `LoraUp` needs.

    It is saved here because recomputed activations end with the last thing that was saved: so a block's last product
    with W, from which nothing else is made, is not made again.
    """

    @staticmethod
    def forward(ctx, first, x, scale, p, *weights):
        rows, half = x.reshape(-1, x.shape[-1]), len(weights) // 2
        a, *bs = torch.cat(weights[:half]).to(x.dtype), *(b.to(x.dtype) for b in weights[half:])
        ctx.seed = int(torch.randint(2**31, ())) if p else 0  # the CPU's generator: checkpointing restores it
        low = _passes(rows, len(a)).down(rows, a, ctx.seed, p, scale)
        first.append(ctx)
        ctx.save_for_backward(rows, low, a, *bs)
        ctx.mark_non_differentiable(*bs)
        ctx.set_materialize_grads(False)
        return low, *bs

    @staticmethod
    def backward(ctx, *_):
        return (None,) * len(ctx.needs_input_grad)  # `LoraUp` has them; this node lives as long as low


class LoraUp(torch.autograd.Function):
    """The layers' outputs, and every gradient."""

    @staticmethod
    def forward(ctx, first, x, low, layers, bs, scale, p, *weights):
        rows, outs = x.reshape(-1, x.shape[-1]), []
        for layer, b, part in zip(layers, bs, low.split([b.shape[1] for b in bs], 1), strict=True):
            bias = None if layer.bias is None else layer.bias.to(x)
            out = nn.functional.linear(part, b, bias).addmm_(rows, plain_weight(layer, x.dtype).T)
            outs.append(out.view(*x.shape[:-1], -1))
        ctx.first, ctx.layers, ctx.scale, ctx.p, ctx.shape = first, layers, scale, p, x.shape
        return tuple(outs)

    @staticmethod
    def backward(ctx, *gradients):
        first, ctx.first = ctx.first, None  # what it has saved goes with it, here and not at the end of the pass
        rows, low, a, *bs = first.saved_tensors
        ranks = [b.shape[1] for b in bs]
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        of_low = torch.cat([gradient @ b for gradient, b in zip(flat, bs, strict=True)], 1)
        of_b = [(gradient.T @ part).float() for gradient, part in zip(flat, low.split(ranks, 1), strict=True)]
        needs_x = ctx.needs_input_grad[1]
        of_x, of_a = _passes(rows, len(a)).up(rows, a, of_low, first.seed, ctx.p, ctx.scale, needs_x)
        if needs_x:
            for gradient, layer in zip(flat, ctx.layers, strict=True):
                of_x.addmm_(gradient, plain_weight(layer, gradient.dtype))
            of_x = of_x.view(ctx.shape)
        return None, of_x, *[None] * 5, *of_a.float().split(ranks), *of_b


class PlainPasses:
    """What `helpers.kernels` does, by PyTorch alone: where Triton is missing, and for ranks beyond its blocks."""

    @staticmethod
    def down(x, a, seed, p, scale):
        return ((x * _mask(x, seed, p) if p else x) @ a.T).mul_(scale)

    @staticmethod
    def up(x, a, gradient, seed, p, scale, needs_x):
        mask, gradient = _mask(x, seed, p) if p else 1, gradient * scale
        return gradient @ a * mask if needs_x else None, gradient.T @ (x * mask)

    @staticmethod
    def turned(qkv, cos, sin):
        both, half = qkv[:, :2].float(), qkv.shape[-1] // 2
        across = torch.cat((-both[..., half:], both[..., :half]), -1)
        both = both * cos[:, None, None].float() + across * sin[:, None, None].float()
        return torch.cat((both.to(qkv.dtype), qkv[:, 2:]), 1)


def _mask(x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """Dropout's factors, 0 or 1 / (1 - p), the same whenever the seed is."""
    drawn = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - p, generator=drawn).div_(1 - p)


def _passes(x: torch.Tensor, ranks: int = 0):
    """The passes over x: one Triton kernel each on a GPU where Triton works."""
    if not x.is_cuda or ranks > MOST_RANKS or not _can_compile():
        return PlainPasses
    from helpers import kernels

    return kernels


def plain_weight(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The layer's weight [outputs, inputs] in `dtype`, dequantized where it is NF4."""
    state = getattr(layer.weight, "quant_state", None)
    return (layer.weight if state is None else dequantize_4bit(layer.weight, state)).to(dtype)


def _lora_forward(self: LoraLayer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The forward pass of a LoRA layer; PEFT's own where there is not exactly one adapter to add.

    The first layer of those that share x computes for all; the others find their outputs ready.
    """
    if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    given, out = self.ready.pop(self, (None, None))
    if given is x:
        return out
    (name,), kind, layers = self.active_adapters, x.device.type, self.sharing
    given, x = x, x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    p = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
    out, *others = lora_products(
        x, [layer.get_base_layer() for layer in layers], self.scaling[name], p,
        [layer.lora_A[name].weight for layer in layers], [layer.lora_B[name].weight for layer in layers])
    self.ready.update((layer, (given, other)) for layer, other in zip(layers[1:], others, strict=True))
    return out


def fuse_lora(tuned: nn.Module) -> int:
    """Give every plain LoRA layer of a model the pass above, and return how many there are.

    What adds something else than B A x (DoRA and PEFT's other variants, a bias) keeps PEFT's own. Layers that
    transformers calls one after the other with one x share it.
    """
    layers = [layer for layer in tuned.modules() if isinstance(layer, LoraLayer)
              and not layer.lora_variant and not any(layer.lora_bias.values())]
    for layer in layers:
        layer.forward, layer.sharing, layer.ready = MethodType(_lora_forward, layer), (layer,), {}
    for parent in list(tuned.modules()):
        for names in SHARING:
            group = tuple(layer for name in names
                          if isinstance(layer := getattr(parent, name, None), LoraLayer) and layer in layers)
            if len(group) == len(names) and sum(max(layer.r.values()) for layer in group) <= MOST_RANKS:
                ready: dict = {}
                for layer in group:
                    layer.ready = ready
                group[0].sharing = group
    return len(layers)


class PictureAttention(torch.autograd.Function):
    """Attention among the patches of each picture, [rows, width], of query, key and value as one product makes them.

    qkv [rows, 3, heads, size]; cos and sin [rows, size] turn query and key; lengths: rows of each picture. transformers
    splits, copies and concatenates the three in every layer. Here one tensor is turned, PyTorch's kernel reads and
    writes parts of it, and what it made may be put `aside` for a pass that recomputes: attention is the dearest part
    of a layer, and its outputs small.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, lengths, kernel, aside, recomputed):
        qkv = _passes(qkv).turned(qkv, cos, sin)
        if recomputed:
            out, sums, backwards = aside.pop()
        else:
            out, sums, backwards = qkv.new_empty(len(qkv), *qkv.shape[2:]), [], []
            for q, k, v, part in _pictures(lengths, *qkv.unbind(1), out):
                made, log_sums, backward = kernel(q, k, v)
                part.copy_(made)
                sums.append(log_sums)
                backwards.append(backward)
            if aside is not None:
                aside.append((out, sums, backwards))
        ctx.save_for_backward(qkv, cos, sin, out, *sums)
        ctx.lengths, ctx.backwards = lengths, backwards
        return out.flatten(1)

    @staticmethod
    def backward(ctx, gradient):
        qkv, cos, sin, out, *sums = ctx.saved_tensors
        of_qkv = torch.empty_like(qkv)
        parts = _pictures(ctx.lengths, gradient.view_as(out), *qkv.unbind(1), out, *of_qkv.unbind(1))
        for (g, q, k, v, made, *of), log_sums, backward in zip(parts, sums, ctx.backwards, strict=True):
            for part, found in zip(of, backward(g, q, k, v, made, log_sums), strict=True):
                part.copy_(found)
        return _passes(of_qkv).turned(of_qkv, cos, -sin), *[None] * 6


def _pictures(lengths: Sequence[int], *tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Of each picture its part of every tensor [rows, heads, size], as PyTorch's attention has them."""
    for parts in zip(*(tensor.split(lengths) for tensor in tensors), strict=True):
        yield [part.transpose(0, 1)[None] for part in parts]


def _cudnn(q, k, v):
    out, sums, *at, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, sums, lambda *all_six: torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *all_six, seed, offset, None, *at, 0.0, False)


def _flash(q, k, v):
    out, sums, *at, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, sums, lambda *all_six: torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *all_six, *at, 0.0, False, seed, offset)


def _flash_on_a_cpu(q, k, v):
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, sums, lambda *all_six: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *all_six, 0.0, False)


def _kernel(x: torch.Tensor, heads: int, length: int) -> Callable | None:
    """The kernel that PyTorch takes for a picture: it returns output, log-sums and backward pass. None: another one."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    q = x.new_empty((1, heads, length, x.shape[-1] // heads), dtype=dtype, requires_grad=torch.is_grad_enabled())
    return {SDPBackend.CUDNN_ATTENTION.value: _cudnn,
            SDPBackend.FLASH_ATTENTION.value: _flash if x.is_cuda else _flash_on_a_cpu
            }.get(torch._fused_sdp_choice(q, q, q))


def fuse_attention(vlm: nn.Module) -> None:
    """Give a Qwen2-VL's vision tower `PictureAttention`, where PyTorch attends by one of its kernels."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        if not hasattr(cu_seqlens, "lengths"):  # all layers get the same tensor
            cu_seqlens.lengths = cu_seqlens.diff().tolist()
        kernel = _kernel(hidden_states, self.num_heads, cu_seqlens.lengths[0])
        if kernel is None:
            return type(self).forward(self, hidden_states, cu_seqlens, position_embeddings, **kwargs)
        qkv = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
        out = PictureAttention.apply(qkv, *position_embeddings, cu_seqlens.lengths, kernel,
                                     *getattr(self, "aside", (None, False)))
        return self.proj(out)

    for module in vlm.modules():
        if isinstance(module, VisionAttention):
            module.forward = MethodType(forward, module)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """In fp32, as under autocast, and rounded to x's dtype, as the layer behind it would."""
    return nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def compile_between(vlm: nn.Module) -> None:
    """Compile what stands between a Qwen2-VL's matrix products, and fuse attention; needs Triton and a C compiler.

    Rotations are replaced in transformers' module, for all models of this process, until `plain_rotations`.
    """
    for name in ROTATIONS:
        plain = getattr(modeling_qwen2_vl, name)
        if not hasattr(plain, "_torchdynamo_orig_callable"):
            setattr(modeling_qwen2_vl, name, torch.compile(plain, dynamic=True))
    fuse_attention(vlm)
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


@cache
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


class Fit(NamedTuple):
    """How a training step fits into a GPU's memory."""

    recompute: bool = False  # activations, in the backward pass
    kept: dict[nn.Module, str] = {}  # what layers keep all the same (`keep`)


def fit(vlm: nn.Module, batch: dict[str, torch.Tensor]) -> Fit:
    """Whether activations must be recomputed, and what layers keep all the same.

    A training step on `batch`, the longest there is, is tried. Gradients of earlier micro-batches, AdamW's two numbers
    a weight and a reserve must fit beside. Where its activations do not, they are recomputed, but attention of the
    vision tower keeps its outputs, if that fits, and whole layers keep everything: as many as the memory allows by what
    two of each tower take, half of them where that does not fit after all. (Half as many pictures at once would not
    help: a step of 4 took .71 of the time of one of 8, as the GPU waits for the host then.)
    With several GPUs in one process no layer keeps anything. Without a GPU nothing is recomputed.
    """
    if not torch.cuda.is_available():
        return Fit()
    took, room = _peak(vlm, batch), _room()
    allowed, takes = (1 - RESERVE) * room, f"takes {took / 2**30:.1f} GiB" if took < math.inf else "does not fit"
    print(f"a step of {len(batch['labels'])} pictures {takes} with its activations kept, of {room / 2**30:.1f} GiB: "
          f"gradient checkpointing is {'off' if took < allowed else 'on'}")
    if took < allowed:
        return Fit()
    if len(gpus()) > 1:
        return Fit(recompute=True)
    base = vlm.get_base_model() if isinstance(vlm, PeftModel) else vlm
    language, vision = base.model.language_model.layers, base.model.visual.blocks
    trains = any(weight.requires_grad for weight in base.model.visual.parameters())

    def with_kept(kept: dict[nn.Module, str]) -> float:
        base.activation_checkpointing_enable()
        keep(kept)
        return _peak(vlm, batch)

    kept = dict.fromkeys(vision, "attention") if trains else {}
    if (took := with_kept(kept)) > allowed and kept:
        kept, took = {}, with_kept({})
    whole, left = [], allowed - took
    for layers in (language, vision) if trains else (language,):
        each = (with_kept(kept | dict.fromkeys(layers[:2], "everything")) - took) / 2
        count = min(len(layers), max(0, int(left / each))) if 0 < each < math.inf else 0
        whole, left = [*whole, *layers[:count]], left - count * each
    while whole and with_kept(kept | dict.fromkeys(whole, "everything")) > allowed:
        whole = whole[: len(whole) // 2]
    kept |= dict.fromkeys(whole, "everything")
    base.activation_checkpointing_disable()
    said = ", ".join(f"{count} layers keep {what}" for what, count in Counter(kept.values()).items())
    print(f"of {len(language) + len(vision)} layers that recompute {said or 'none keeps anything'}")
    return Fit(True, kept)


def keep(kept: dict[nn.Module, str]) -> None:
    """Let layers whose activations are recomputed keep "everything", or (vision) what "attention" has made."""
    for layer, what in kept.items():
        if what == "everything":
            layer.gradient_checkpointing = False
        else:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False,
                                                         context_fn=partial(_keeping, layer.attn))


def _keeping(attention: VisionAttention) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For `checkpoint`: the forward pass puts aside what attention has made, the recomputed one takes it from there."""
    aside: list = []
    return _with_aside(attention, aside, False), _with_aside(attention, aside, True)


@contextmanager
def _with_aside(attention: VisionAttention, aside: list, recomputed: bool) -> Iterator[None]:
    attention.aside = aside, recomputed
    try:
        yield
    finally:
        del attention.aside


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
        given = with_features({name: tensor.to(vlm.device) for name, tensor in batch.items()})
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
    """Lets layers keep what `fit` found room for, when the training begins."""

    def __init__(self, kept: dict[nn.Module, str]):
        self.kept = kept

    def on_train_begin(self, *args, **kwargs) -> None:
        keep(self.kept)


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


def with_features(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as Qwen2-VL takes it: cached `image_features` in the place of what its vision tower would make."""
    rest = {name: value for name, value in batch.items() if name != "image_features"}
    if "image_features" not in batch:
        return rest
    made = BaseModelOutputWithPooling(pooler_output=(batch["image_features"],))
    return rest | {"mm_encoder_outputs": {"image": made}}


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
