"""Small reproductions of costly bugs, for notebooks/05_debug_dtype_issue and its tests: what both need to show one."""

import copy
import gc
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from helpers.collate import IGNORED

UNIT = re.compile(
    r"<\|object_ref_start\|>[^<]+<\|object_ref_end\|><\|box_start\|>\(\d+,\d+\),\(\d+,\d+\)<\|box_end\|>(<\|im_end\|>)?"
)  # one box, the end of the turn behind it, and nothing else: what a strict evaluation accepts


def outcome(call: Callable[[], torch.Tensor]) -> str:
    """What a forward pass gives: its loss to four digits, or the error's type and first line."""
    try:
        return f"loss {call().item():.4f}"
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def halves(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A batch as `nn.DataParallel` gives it to two GPUs: every tensor cut in two along its first axis."""
    return [dict(zip(batch, parts, strict=True))
            for parts in zip(*(tensor.chunk(2) for tensor in batch.values()), strict=True)]


def config(folder: Path, **options) -> SFTConfig:
    """A short, silent training on the CPU."""
    silent = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    return SFTConfig(str(folder), **silent | {"max_length": None, "remove_unused_columns": False,
                                              "gradient_checkpointing": False} | options)


def on_two_gpus(trainer_class: type, vlm: nn.Module, placed: dict[str, int | str], folder: Path, **material) -> dict:
    """What a trainer makes of a batch of 4 where it sees two GPUs and the model lies as `placed` says.

    The two GPUs are a stand-in, so this needs none: `torch.cuda.device_count` says 2. `material`: the trainer's
    collator, rows and processor. Returns `{"n_gpu", "batch", "model"}` (the class that would be called), or
    `{"refused": why}`.
    """
    vlm.hf_device_map = placed
    with patch("torch.cuda.device_count", return_value=2), patch("torch.cuda.is_available", return_value=False):
        asked = config(folder, use_cpu=False, bf16=False, per_device_train_batch_size=4)
        try:
            made = trainer_class(vlm, asked, **material)
        except ValueError as error:
            return {"refused": str(error).split(". ")[0]}
        called = type(made._wrap_model(vlm)).__name__
    return {"n_gpu": made.args.n_gpu, "batch": made.args.train_batch_size, "model": called}


class AtStart(TrainerCallback):
    """Keeps a copy of the weights that train, and the step, as the training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.step = state.global_step
        self.weights = {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}


def resumed(trainer_class: type, load: Callable[[], nn.Module], folder: Path, **material
            ) -> tuple[dict[str, torch.Tensor], AtStart]:
    """Train the vision tower for two steps; resume from `checkpoint-2` in a new trainer.

    Returns the weights that were trained (`{name: tensor}`), and what the second trainer began with.
    """
    options = {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "bf16": True}
    trained: dict[str, torch.Tensor] = {}
    for checkpoint in (None, str(folder / "checkpoint-2")):
        vlm, start = load(), AtStart()
        vlm.model.visual.float().requires_grad_(True)
        sft = trainer_class(vlm, config(folder, **options), callbacks=[start], **material)
        sft.remove_callback(PrinterCallback)
        sft.train(resume_from_checkpoint=checkpoint)
        trained = trained or {name: w.detach() for name, w in vlm.named_parameters() if w.requires_grad}
    return trained, start


def one_step(vlm: nn.Module, batch: dict[str, torch.Tensor], autocast: bool) -> dict:
    """One step of AdamW on a layer of the vision tower: what is held in which dtype, and Adam's memory after 1000 more.

    Returns `{"weights", "gradient", "Adam" (dtypes), "bytes a weight", "1 · .999 ^ 1000", "logits" [N, T, V] in fp32}`.
    The fifth: Adam's second moment of 1, after 1000 steps of no gradient.
    """
    weight = vlm.model.visual.blocks[0].mlp.fc1.weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = vlm(**batch)
    out.loss.backward()
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    faded = torch.ones(1, dtype=second.dtype)
    for _ in range(1000):
        faded.mul_(0.999)
    held = {"weights": weight, "gradient": weight.grad, "Adam": second}
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in held.items()} | {
        "bytes a weight": sum(tensor.element_size() for tensor in (*held.values(), second)),
        "1 · .999 ^ 1000": faded.item(), "logits": out.logits.detach().float(),
    }


def stochastic_round(weights: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, up or down by chance, the nearer the likelier: right on average.

    A bf16 number is the upper half of a float32: a random lower half is added, then the lower half is cut off.
    """
    noise = torch.randint(0, 2**16, weights.shape, dtype=torch.int32, device=weights.device)
    return ((weights.contiguous().view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


def half_gap(weights: torch.Tensor) -> torch.Tensor:
    """Half the distance from each bf16 weight to its larger neighbour: a smaller step is rounded away. 0 for a zero."""
    gap = torch.ldexp(torch.ones_like(weights, dtype=torch.float32), torch.frexp(weights.float()).exponent - 9)
    return gap.where(weights != 0, 0.0)


def moved(before: Iterable[torch.Tensor], after: Iterable[torch.Tensor]) -> float:
    """Share of weights (0-1) whose stored value has changed."""
    pairs = [(x.detach().flatten(), y.detach().flatten()) for x, y in zip(before, after, strict=True)]
    return sum((x != y).sum().item() for x, y in pairs) / sum(len(x) for x, _ in pairs)


def walk(start: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], rate: float, steps: int, held: str
         ) -> dict[str, list[float]]:
    """AdamW from bf16 weights `start` with the same gradients every step; the weights held in one of three ways.

    `held`: "bf16", "fp32" (master weights), "stochastic" (bf16, rounded by chance). Returns a number a step: "moved",
    the share of weights that differ from the start, and "distance", the mean way along the gradient in units of `rate`.
    """
    dtype = torch.bfloat16 if held == "bf16" else torch.float32
    weights = [nn.Parameter(w.detach().to(dtype, copy=True)) for w in start]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.to(dtype)
    optimizer, count = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0), sum(w.numel() for w in start)
    seen: dict[str, list[float]] = {"moved": [], "distance": []}
    for _ in range(steps):
        optimizer.step()
        if held == "stochastic":
            for weight in weights:
                weight.data = stochastic_round(weight.data).float()
        way = sum(((s.float() - w.float()) * g.float().sign()).sum().item()
                  for s, w, g in zip(start, weights, gradients, strict=True))
        seen["moved"].append(moved([s.float() for s in start], [w.float() for w in weights]))
        seen["distance"].append(way / count / rate)
    return seen


@torch.no_grad()
def scale_residual(vlm: nn.Module, factor: float) -> nn.Module:
    """The same function with a residual stream `factor` times as large: every layer normalises what it reads.

    All that is written into the stream is multiplied: embeddings, image tokens, each layer's two outputs. The head must
    have weights of its own (at 7B and tiny it has).
    """
    language, last = vlm.model.language_model, vlm.model.visual.merger.mlp[2]
    written = [language.embed_tokens.weight, last.weight, last.bias]
    for layer in language.layers:
        written += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    for weight in written:
        weight.mul_(factor)
    return vlm


def largest_activation(vlm: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The largest absolute output of a layer of the language model during one forward pass."""
    largest: list[float] = []

    def look(module, inputs, output) -> None:
        largest.append((output[0] if isinstance(output, tuple) else output).abs().max().item())

    hooks = [layer.register_forward_hook(look) for layer in vlm.model.language_model.layers]
    with torch.inference_mode():
        vlm(**batch)
    for hook in hooks:
        hook.remove()
    return max(largest)


def learn_head(vlm: nn.Module, batch: dict[str, torch.Tensor], labels: torch.Tensor, end: int, steps: int = 60
               ) -> nn.Module:
    """A copy of `vlm` that forgets when to stop and learns its head again from `labels` [N, T].

    The head's row for `end` becomes the average row: a base that was never taught this token. Only the head trains.
    """
    vlm = copy.deepcopy(vlm).requires_grad_(False)
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
    return vlm.eval()


def strict_detection(texts: Sequence[str]) -> float:
    """Share of answers (0-1) that are one box and nothing else, every token in its place."""
    return sum(bool(UNIT.fullmatch(text)) for text in texts) / len(texts)


def living_weights() -> float:
    """MB of all parameters that some reference still holds in this process."""
    weights = [item for item in gc.get_objects() if type(item) is nn.Parameter]
    return sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
