"""How large Qwen2-VL and its parts are, at 7B too, where no weight takes memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

PARTS = {
    "vision: patch embedding": "model.visual.patch_embed",
    "vision: blocks": "model.visual.blocks",
    "vision: merger": "model.visual.merger",
    "language: embeddings": "model.language_model.embed_tokens",
    "language: layers": "model.language_model.layers",
    "language: last norm": "model.language_model.norm",
    "head": "lm_head",
}


def seven_b() -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL-7B-Instruct, every module with its shapes, on PyTorch's meta device: nothing is downloaded or stored."""
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584},
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(config).requires_grad_(False)


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Weights in each part of `PARTS`; those of a tied head count once, as embeddings."""
    return {part: sum(weight.numel() for name, weight in model.named_parameters() if name.startswith(prefix))
            for part, prefix in PARTS.items()}  # fmt: skip


def lora_weights(model: nn.Module, pattern: str, rank: int) -> int:
    """What LoRA adds on the linear layers that `pattern` matches, whole: [rank, inputs] and [outputs, rank] on each."""
    return sum(rank * (layer.in_features + layer.out_features) for name, layer in model.named_modules()
               if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name))  # fmt: skip


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts what a forward pass inside keeps for the backward pass, `{"kept": bytes}`, the weights not included."""
    known, total = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {"kept": 0}
    alive = []  # or a freed tensor's address could come again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(tensor)
            total["kept"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
