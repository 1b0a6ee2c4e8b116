"""One step of the tiny base's training: losses, optimizers, the running average of the weights."""

import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from helpers.tiny.forward import Frame, forward, frame_of
from helpers.tiny.questions import NAMES

WEIGHT_DECAY = 0.05


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, over the answers and their end tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


class Guide(torch.nn.Module):
    """A crutch for the first part of the training, thrown away after it: what lies under each image token, and where.

    Without it the model writes well-formed boxes that ignore the picture for thousands of steps: the answers alone
    say too little about where to look. From the states [B, N, width] half-way up the language model it reads the
    kind of thing (0 for none) and the thing's box (x0, y0, x1, y1 in 0-1) under each image token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.out = torch.nn.LayerNorm(width), torch.nn.Linear(width, 1 + len(NAMES) + 4)

    def loss(self, states: torch.Tensor, kinds: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """`kinds` [B, N] whole numbers, `boxes` [B, N, 4]; cross-entropy plus five times the boxes' mean error."""
        read = self.out(self.norm(states.float()))
        inside = (kinds > 0).float()
        error = (read[..., -4:].sigmoid() - boxes).abs().mean(-1)
        wrong = F.cross_entropy(read[..., :-4].flatten(0, 1), kinds.flatten())
        return wrong + 5 * (error * inside).sum() / inside.sum().clamp(min=1)


def learning_rate(progress: float, peak: float, rise: float = 0.04) -> float:
    """One cycle over `progress` 0-1: up in a straight line to `peak`, then down along a cosine to 1 % of it."""
    if progress < rise:
        return peak * (0.01 + 0.99 * progress / rise)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise))))


def on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on `device`, copied there without waiting for the work that the GPU still has to do."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Learner:
    """Model, guide, optimizers and the running average of the weights: one step, saved and restored together.

    Muon (https://kellerjordan.github.io/posts/muon/) for the matrices inside blocks and layers, AdamW for the rest.
    On a GPU the thousands of small operations of a step are recorded once for each picture size and text length, as a
    CUDA graph, and replayed: launched one by one they would keep the GPU waiting five sixths of the time.
    """

    def __init__(self, model: torch.nn.Module, peak: float, decay: float, guided: float):
        self.model, self.peak, self.decay, self.guided = model, peak, decay, guided
        self.device = next(model.parameters()).device
        self.guide = Guide(model.config.text_config.hidden_size).to(self.device)
        self.mean = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.weights = [*model.parameters(), *self.guide.parameters()]
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)  # these stay: a graph writes where it was recorded
        towers = (model.model.visual.blocks, model.model.language_model.layers)
        self.hidden = [p for tower in towers for p in tower.parameters() if p.ndim == 2]
        # Muon's own rate is a number that a graph would freeze: it writes the directions at rate 1, `update` walks them
        self.directions = [torch.zeros_like(p) for p in self.hidden]
        for direction, weight in zip(self.directions, self.hidden, strict=True):
            direction.grad = weight.grad
        self.rate, self.guidance, self.blend = (torch.zeros((), device=self.device) for _ in range(3))
        among = {id(p) for p in self.hidden}
        groups = [{"params": [p for p in self.weights if id(p) not in among and (p.ndim > 1) is many],
                   "weight_decay": WEIGHT_DECAY * many} for many in (True, False)]  # fmt: skip
        self.adamw = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), fused=True,
                                       capturable=self.device.type == "cuda")  # fmt: skip
        self.muon = torch.optim.Muon(self.directions, lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.steps, self.seen, self.frames, self.graphs = 0, Counter(), {}, {}

    def step(self, pixels: torch.Tensor, item: dict, progress: float) -> torch.Tensor:
        """One update at `progress` (0-1) of the training; the answers' and the guide's loss [2]."""
        key = (item["size"], item["input_ids"].shape)
        if key not in self.frames:
            self.frames[key] = frame_of(self.model, item["size"], item["input_ids"][:1])
        self.steps += 1
        self.rate.fill_(learning_rate(progress, self.peak))
        self.guidance.fill_(max(0.0, 1 - progress / self.guided))
        self.blend.fill_(1 - min(self.decay, self.steps / (self.steps + 9)))
        inputs = [pixels, *(on(self.device, item[name]) for name in ("input_ids", "labels", "kinds", "boxes"))]
        if key not in self.graphs:
            losses = self.update(*inputs, self.frames[key])
            self.seen[key] += 1
            if self.device.type == "cuda" and self.seen[key] == 2:
                self._record(key, inputs)
            return losses
        graph, places, losses = self.graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return losses.clone()

    def _record(self, key: tuple, inputs: list[torch.Tensor]) -> None:
        places, graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            losses = self.update(*places, self.frames[key])
        self.graphs[key] = graph, places, losses

    def update(self, pixels, ids, labels, kinds, boxes, frame: Frame) -> torch.Tensor:
        """The step itself, without a word to the CPU: forward, both losses, backward, optimizers, average."""
        torch._foreach_zero_([weight.grad for weight in self.weights])
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            logits, middle = forward(self.model, pixels, ids, frame)
        answer, guide = answer_loss(logits, labels), self.guide.loss(middle, kinds, boxes)
        (answer + self.guidance * guide).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_zero_(self.directions)
            self.muon.step()
            torch._foreach_mul_(self.directions, self.rate)
            torch._foreach_mul_(self.hidden, 1 - self.rate * WEIGHT_DECAY)
            torch._foreach_add_(self.hidden, self.directions)
            moved = torch._foreach_sub(list(self.model.parameters()), list(self.mean.values()))
            torch._foreach_mul_(moved, self.blend)
            torch._foreach_add_(list(self.mean.values()), moved)
        return torch.stack([answer.detach(), guide.detach()])

    def _parts(self) -> dict:
        return {"model": self.model, "guide": self.guide, "adamw": self.adamw, "muon": self.muon}

    def save(self, path: Path, step: int) -> None:
        """Write everything to `path`, whole or not at all."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({"step": step, "mean": self.mean, **parts}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def restore(self, path: Path) -> int:
        """Read what `save` wrote; the number of steps already done, 0 without a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for group in self.adamw.param_groups:
            group["lr"] = self.rate
        for name, value in state["mean"].items():
            self.mean[name].copy_(value)
        self.steps = state["step"]
        return self.steps
