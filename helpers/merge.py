"""Adapter + base -> one checkpoint, with the proof that the algebra is right."""

import hashlib
import math
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from helpers import model as models
from helpers import parity

ROWS = 16  # rows of each layer's matrix that are checked weight by weight
COMPARED = 64  # last tokens whose logits are compared: at 7B those of a whole batch would take 1.5 GiB, twice


@torch.inference_mode()
def merge_adapter(model: PeftModel, batch: dict[str, torch.Tensor] | None) -> tuple[torch.nn.Module, float | None]:
    """Merge the adapter into the base it sits on, which must not be quantized.

    `batch` is a collated batch. Returns the plain model and the relative difference of the logits, before against
    after: ||before - after|| / ||before||, over the last `COMPARED` tokens; None without a batch. Raises ValueError
    that names a layer whose merged weights are not W + scaling B A, rounded once to the dtype they are stored in; and
    where the logits differ by more than rounding does in fp32, 1e-5. (In bf16 any number passes, as rounding grows
    through the layers: there the check of each layer counts.)
    """
    models.check_4bit(model)
    before = _last_logits(model, batch) if batch is not None else None
    expected = {name: _exact_rows(layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    merged = model.merge_and_unload(safe_merge=True)
    for name, (rows, exact, allowed) in expected.items():
        off = (merged.get_submodule(name.removeprefix("base_model.model.")).weight[rows].float() - exact).abs()
        if not (off <= allowed).all():
            raise ValueError(f"{name}: merged weights differ by up to {off.max():.1e} from base + adapter, and "
                             "rounding does not explain it: the merge is wrong.")
    if batch is None or before is None:
        return merged, None
    difference = ((before - _last_logits(merged, batch)).norm() / before.norm()).item()
    if math.isnan(difference) or (merged.dtype == torch.float32 and difference > 1e-5):
        raise ValueError(f"merged logits differ by {difference:.2e} of their size from base + adapter in "
                         f"{merged.dtype}, and rounding explains 1e-05 at most in float32: the merge is wrong.")
    return merged, difference


def _last_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the last `COMPARED` tokens that are not padding, in fp32: [tokens, vocabulary]."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    real = inputs["attention_mask"][:, -COMPARED:].bool()
    return model(**inputs, logits_to_keep=COMPARED).logits[real].float()


def _exact_rows(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row numbers [16], what these rows should be after merging, in fp32, and how far rounding takes them [16, n]."""
    base = layer.get_base_layer().weight
    rows = torch.linspace(0, len(base) - 1, ROWS, device=base.device).long()
    (adapter,) = layer.active_adapters
    up, down = layer.lora_B[adapter].weight[rows].float(), layer.lora_A[adapter].weight.float()
    delta = layer.scaling[adapter] * (up @ down)
    exact = base[rows].float() + delta
    allowed = torch.finfo(base.dtype).eps * (exact.abs() + delta.abs()) + 1e-5 * delta.abs().max()
    return rows, exact, allowed


def save_whole(model: torch.nn.Module, processor, folder: Path) -> None:
    """Write a model and its processor in bf16 to `folder`: all of it, or nothing if the process is killed."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    processor.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def save_merged(merged: torch.nn.Module, processor, folder: Path, made_with: dict, base: dict[str, str]) -> None:
    """`save_whole`, proven by loading it again, with its parity.json."""
    save_whole(merged, processor, folder)
    weights = fingerprints(merged)
    del merged  # one copy in memory is enough
    check_reload(weights, folder)
    parity.write(folder, made_with, base)


def fingerprints(model: torch.nn.Module) -> dict[str, str]:
    """`{name: hash}` of every weight's bytes: what `check_reload` compares with, when the model itself is gone."""
    return {name: hashlib.sha256(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
            for name, weight in model.state_dict().items()}


def check_reload(kept: dict[str, str], folder: Path) -> None:
    """Raise ValueError unless `folder` loads to exactly the weights of `fingerprints` (bf16): none lost or changed."""
    again = models.load(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    loaded = fingerprints(again)
    for name in sorted(set(kept) | set(loaded)):
        if kept.get(name) != loaded.get(name):
            raise ValueError(f"{folder}: {name} is not the weight that was saved; do not use this folder.")
