"""What rounding to NF4 does: to a matrix, to each layer of a model, to its choices, to the boxes in the end."""

from collections.abc import Sequence

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from helpers.collate import IGNORED
from helpers.sizes import linear_layers


def nf4(weight: torch.Tensor, block: int = 64, double: bool = True) -> tuple[torch.Tensor, torch.Tensor, QuantState]:
    """bitsandbytes' NF4 of a matrix: its values after rounding (fp32, same shape), the packed bytes, the scales."""
    packed, state = quantize_4bit(weight.float().contiguous(), blocksize=block, quant_type="nf4",
                                  compress_statistics=double)  # fmt: skip
    return unpack(packed, state), packed, state


def unpack(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The values that NF4's bytes stand for, level x scale, fp32, in the shape that was packed.

    bitsandbytes' own `dequantize_4bit` gives the same, but on a CPU with AVX-512 only where a row is a whole number of
    blocks: in 0.50 it takes the wrong scales elsewhere. Raises ValueError after a layer has answered on a CPU:
    bitsandbytes then holds its bytes in another order.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("the NF4 bytes are in bitsandbytes' order for fast answers on a CPU; look at the weights of a "
                         "model that has not answered yet.")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: state.shape.numel()]
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = state.code[codes.long()].float() * scales.repeat_interleave(state.blocksize)[: len(codes)]
    return values.reshape(state.shape)


def relative_error(changed: torch.Tensor, exact: torch.Tensor) -> float:
    """||changed - exact|| / ||exact||, in fp32."""
    return ((changed.float() - exact.float()).norm() / exact.float().norm()).item()


@torch.inference_mode()
def layer_errors(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """What NF4 would do to each linear layer: `{name: {"weights", "outputs"}}`, relative errors.

    "outputs" is measured on what the layer sees when `model` (not quantised) runs on `batch`, each layer alone: the
    layers before it are exact. The head is left out, as it is never quantised.
    """
    errors, handles = {}, []
    for name in linear_layers(model):
        if name == "lm_head":
            continue

        def note(layer, inputs, output, name=name):
            exact = layer.weight.float()
            rounded = nf4(exact)[0]
            x = inputs[0].float()
            errors[name] = {"weights": relative_error(rounded, exact),
                            "outputs": relative_error(x @ rounded.T, x @ exact.T)}  # fmt: skip

        handles.append(model.get_submodule(name).register_forward_hook(note))
    model(**batch)
    for handle in handles:
        handle.remove()
    return errors


@torch.inference_mode()
def answer_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 [n, vocabulary], on the CPU: the logits that choose each token inside the loss of a collated batch."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    return logits[(batch["labels"][:, 1:] != IGNORED).to(logits.device)].float().cpu()


def held(weight: nn.Parameter) -> torch.Tensor:
    """A layer's weights as they count, fp32, unpacked where they are NF4."""
    state = getattr(weight, "quant_state", None)
    return weight.float() if state is None else unpack(weight.data, state)


@torch.inference_mode()
def adapter_left(tuned: PeftModel, merged: nn.Module) -> float:
    """How much of the adapter of `tuned` is found in the weights of `merged`: 1 is all of it, 0 nothing.

    The change of the weights against the base of `tuned`, along what LoRA adds, over all layers that it sits on.
    Neither model may have answered yet (`unpack`).
    """
    along = whole = 0.0
    for name, layer in tuned.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            delta = layer.get_delta_weight(adapter).float()
            after = merged.get_submodule(name.removeprefix("base_model.model.")).weight
            along += ((held(after) - held(layer.get_base_layer().weight)) * delta).sum().item()
            whole += delta.square().sum().item()
    return along / whole


@torch.inference_mode()
def adapter_size(tuned: PeftModel) -> float:
    """||B A|| / ||W||: what LoRA adds, against the weights that it sits on, over all layers."""
    added = base = 0.0
    for layer in tuned.modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            added += layer.get_delta_weight(adapter).float().square().sum().item()
            base += held(layer.get_base_layer().weight).square().sum().item()
    return (added / base) ** 0.5


def box_shifts(before: Sequence[dict], after: Sequence[dict]) -> np.ndarray:
    """How far boxes move between two lists of predictions: the farthest edge of each picture, thousandths, float [n].

    NaN where the number of boxes differs, 0 where neither has one.
    """
    shifts = []
    for old, new in zip(before, after, strict=True):
        a, b = (np.reshape(line["boxes"], (-1, 4)) for line in (old, new))
        shifts.append(np.nan if len(a) != len(b) else 1000 * np.abs(a - b).max(initial=0.0))
    return np.array(shifts)
