"""Adapter + base -> one checkpoint, with the proof that the algebra is right."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import Qwen2VLForConditionalGeneration


@torch.inference_mode()
def merge_adapter(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, float]:
    """Merge the adapter into the base it sits on, which must not be quantised.

    `batch` is a collated batch. Returns the plain model and the relative difference of the logits, before against
    after: ||before - after|| / ||before||, over the real tokens.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    real = inputs["attention_mask"].bool()
    before = model(**inputs).logits[real].float()
    merged = model.merge_and_unload(safe_merge=True)
    after = merged(**inputs).logits[real].float()
    return merged, ((before - after).norm() / before.norm()).item()


def check_algebra(difference: float, dtype: torch.dtype) -> None:
    """Raise ValueError unless the relative difference of the logits is rounding: 1e-5 in fp32, 3e-2 in bf16."""
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    if not difference <= tolerance:
        raise ValueError(f"merged logits differ by {difference:.2e} of their size from base + adapter in {dtype}, and "
                         f"rounding explains {tolerance:.0e} at most: the merge is wrong.")


def save_whole(model: torch.nn.Module, processor, folder: Path) -> None:
    """Write a model and its processor in bf16 to `folder`: all of it, or nothing if the process is killed."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    processor.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def check_reload(model: torch.nn.Module, folder: Path) -> None:
    """Raise ValueError unless `folder` loads to exactly the weights of `model` (bf16): no key lost, none changed."""
    again = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    kept, loaded = model.state_dict(), again.state_dict()
    for name in sorted(set(kept) | set(loaded)):
        if name not in kept or name not in loaded or not torch.equal(kept[name].cpu(), loaded[name]):
            raise ValueError(f"{folder}: {name} is not the weight that was saved; do not use this folder.")
