"""LoRA in fewer passes over memory, and the work between matrix products in one kernel each: for a GPU.

PEFT's LoRA makes the base's output, LoRA's output, LoRA's scaled output and the sum, each as large as the layer's own.
Here LoRA's product is added to the base's output in place (`addmm_`), forward and backward, as in Unsloth's kernels
(https://github.com/unslothai/unsloth). Norms, activations and rotations are compiled. All of it is equal to the plain
way up to rounding; dropout is PEFT's, one mask a layer.
"""

from types import MethodType

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._triton import has_triton
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2MLP, Qwen2VLRMSNorm, VisionMlp

ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")  # functions of transformers' module


class LoraProduct(torch.autograd.Function):
    """x W' + bias + scale * dropout(x) A' B', for a frozen W held in NF4 or plainly.

    x [..., inputs]; A [rank, inputs] and B [outputs, rank] in fp32, used in x's dtype; W as `base` holds it. W is put
    together anew for the backward pass, so that only x, dropout's mask and a [rows, rank] product are kept.
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
    """The layer's weight [outputs, inputs] in `dtype`, put together where it is held in NF4."""
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
    """Give transformers' module its own rotations back: a model that answers then does so as it would anywhere."""
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


def speed_up(tuned: nn.Module) -> str:
    """Both of the above where they pay, with a model on one GPU; says in words what was done.

    `TORCHDYNAMO_DISABLE=1` in the environment is PyTorch's own switch against compiling.
    """
    places = {str(place) for place in (getattr(tuned, "hf_device_map", None) or {}).values()}
    if not torch.cuda.is_available() or len(places) > 1:
        return "nothing is fused or compiled: that pays with a model on one GPU"
    lora = "LoRA is added in place" if fuse_lora(tuned) else "there is no LoRA to fuse"
    if not _can_compile():
        return f"{lora}; nothing is compiled, as Triton, a C compiler or Python's headers are missing"
    compile_between(tuned)
    return f"{lora}; what stands between the matrix products is compiled"
