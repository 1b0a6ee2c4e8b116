"""What notebooks/05_debug_dtype_issue needs to make its bugs happen, where that is too long for a cell."""

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from torch import nn
from transformers import TrainerCallback
from trl import SFTTrainer

from helpers.collate import IGNORED
from helpers.topics.training import trainer_for


def outcome(call: Callable, *args, **kwargs) -> str:
    """What a call gives, as text: a model's loss to four digits, or the error's type and first line."""
    try:
        return f"loss {call(*args, **kwargs).loss.item():.4f}"
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def on_two_gpus(vlm: nn.Module, placed: dict[str, int | str], rows, processor, folder: Path, kind: type) -> dict:
    """What a trainer makes of a batch of 4 where two GPUs are visible and the model lies as `placed` says.

    The two GPUs are a stand-in: `torch.cuda.device_count` says 2. Returns `{"GPUs counted", "batch", "model"}` (the
    class that would be called).
    """
    vlm.hf_device_map = placed
    with patch("torch.cuda.device_count", return_value=2), patch("torch.cuda.is_available", return_value=False):
        made = trainer_for(vlm, rows, processor, folder, kind, per_device_train_batch_size=4, use_cpu=False, bf16=False)
        called = type(made._wrap_model(vlm)).__name__
    return {"GPUs counted": made.args.n_gpu, "batch": made.args.train_batch_size, "model": called}


def walk(start: Sequence[nn.Parameter], rate: float, steps: int, dtype: torch.dtype) -> pd.DataFrame:
    """AdamW from `start`, with its gradients at every step, the weights stored in `dtype`.

    Returns a row for each step: "moved", the share of weights that differ from the start, and "way", the mean way
    along the gradient in units of `rate`.
    """
    before, downhill = (torch.cat([t.detach().float().flatten() for t in tensors])
                        for tensors in (start, [-weight.grad.sign() for weight in start]))
    weights = [nn.Parameter(weight.detach().to(dtype, copy=True)) for weight in start]
    for weight, other in zip(weights, start, strict=True):
        weight.grad = other.grad.to(dtype)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    noted = []
    for _ in range(steps):
        optimizer.step()
        change = torch.cat([weight.detach().float().flatten() for weight in weights]) - before
        noted.append({"moved": (change != 0).float().mean().item(), "way": (change * downhill).mean().item() / rate})
    return pd.DataFrame(noted, index=range(1, steps + 1))


class AtStart(TrainerCallback):
    """Keeps a copy of the weights that train as the training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.weights = {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}


def resumed(kind: type[SFTTrainer], load: Callable[[], nn.Module], rows, processor, folder: Path
            ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train the vision tower for two steps; resume from `checkpoint-2` in a new trainer of the same `kind`.

    Returns the weights that were trained (`{name: tensor}`), and those that the second trainer began with.
    """
    trained: dict[str, torch.Tensor] = {}
    for checkpoint in (None, str(folder / "checkpoint-2")):
        vlm, start = load(), AtStart()
        vlm.model.visual.float().requires_grad_(True)
        sft = trainer_for(vlm, rows, processor, folder, kind, max_steps=2, save_strategy="steps", save_steps=2,
                          per_device_train_batch_size=2)
        sft.add_callback(start)
        sft.train(resume_from_checkpoint=checkpoint)
        trained = trained or {name: w.detach() for name, w in vlm.named_parameters() if w.requires_grad}
    return trained, start.weights


def one_step(vlm: nn.Module, batch: dict[str, torch.Tensor], autocast: bool) -> dict:
    """AdamW's step on a layer of the vision tower: its dtypes, and .999 of a second moment of 1 as it stores it."""
    weight = vlm.model.visual.blocks[0].mlp.fc1.weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        vlm(**batch).loss.backward()
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    return {"weights": weight.dtype, "gradient": weight.grad.dtype, "second moment": second.dtype,
            ".999 of a moment of 1": torch.ones(1, dtype=second.dtype).mul(0.999).item()}


@torch.no_grad()
def scale_residual(vlm: nn.Module, factor: float) -> nn.Module:
    """The same function with a residual stream `factor` times as large: every layer normalizes what it reads.

    All that is written into the stream is multiplied: embeddings, image tokens, each layer's two outputs.
    """
    language, last = vlm.model.language_model, vlm.model.visual.merger.mlp[2]
    written = [language.embed_tokens.weight, last.weight, last.bias]
    for layer in language.layers:
        written += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    for weight in written:
        weight.mul_(factor)
    return vlm


def learn_head(vlm: nn.Module, batch: dict[str, torch.Tensor], labels: torch.Tensor, end: int, steps: int = 60
               ) -> nn.Module:
    """`vlm`, whose head forgets the token `end` (its row becomes the average row) and learns from `labels` [N, T]."""
    head = vlm.lm_head.requires_grad_(True)
    with torch.no_grad():
        head.weight[end] = head.weight.mean(0)
        hidden = vlm.model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state[:, :-1]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return vlm
