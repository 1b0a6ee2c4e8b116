"""Where a training step's time goes: marks on the device as a micro-batch passes from part to part.

CUDA events on a GPU, which nothing waits for; the clock on a CPU.
"""

import statistics
import time
from collections.abc import Callable

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback

PARTS = ("vision", "language", "head and loss", "optimiser", "waiting for data", "everything else")


def mark() -> torch.cuda.Event | float:
    """This moment on the device."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds from one mark to another; on a GPU both must have been reached."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """Operations a second of a square matrix product in the model's own dtype here, the median of `repeats`."""
    from helpers import model  # not with the module, which Unsloth's environment imports too

    device = "cuda" if torch.cuda.is_available() else "cpu"
    one, other = (torch.randn(size, size, device=device, dtype=model.compute_dtype()) for _ in range(2))
    one @ other
    marks = [mark()]
    for _ in range(repeats):
        one @ other
        marks.append(mark())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 2 * size**3 / statistics.median(between(a, b) for a, b in zip(marks, marks[1:], strict=False))


class StepClock(TrainerCallback):
    """Marks where a trainer's micro-batches pass from part to part, and where its steps end."""

    def __init__(self, sft: Trainer):
        self.batches: list[dict] = []  # one a micro-batch: {place: mark}
        self.ends: list = []  # one a step
        self.handles, tuned = [], sft.model
        base = tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned
        for name, module in (("vision", base.model.visual), ("language", base.model.language_model)):
            self.handles += [module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                             module.register_forward_hook(self._leaving(name))]  # fmt: skip
        step = sft.training_step

        def training_step(*args, **kwargs):
            self.batches.append({"start": mark()})
            loss = step(*args, **kwargs)
            self.batches[-1]["end"] = mark()
            return loss

        sft.training_step = training_step
        sft.add_callback(self)

    def _note(self, place: str) -> Callable:
        return lambda *_: self.batches[-1].setdefault(place, mark()) and None

    def _entering(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            self._note(f"{name} in")()
            embedded = kwargs.get("inputs_embeds")
            if embedded is not None and embedded.requires_grad:
                embedded.register_hook(self._note(f"gradient of {name} in"))

        return hook

    def _leaving(self, name: str) -> Callable:
        def hook(module, args, output):
            self._note(f"{name} out")()
            if name == "language":
                output[0].register_hook(self._note(f"gradient of {name} out"))

        return hook

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(mark())

    def split(self, accumulation: int, micro_batch: int, pictures: int) -> dict[str, float]:
        """Seconds by part of `PARTS` for `pictures` pictures and one update, from the steps after the first."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for handle in self.handles:
            handle.remove()
        parts = [self._parts(batch) for batch in self.batches[accumulation:]]
        found = {part: statistics.median(one[part] for one in parts) * pictures / micro_batch for part in parts[0]}
        last = self.batches[accumulation - 1 :: accumulation]
        first = self.batches[accumulation::accumulation]
        updates = [between(batch["end"], end) for batch, end in zip(last[1:], self.ends[1:], strict=True)]
        found["optimiser"] = statistics.median(updates)
        waits = [between(a, b["start"]) for a, b in zip(self.ends, first, strict=False)]
        found["waiting for data"] = statistics.median(waits) * pictures / micro_batch / accumulation
        return {part: found[part] for part in PARTS}

    def _parts(self, batch: dict) -> dict[str, float]:
        down = batch.get("gradient of language in", batch["end"])
        vision = between(batch["vision in"], batch["vision out"]) if "vision in" in batch else 0.0
        vision += between(down, batch["end"]) if "gradient of language in" in batch else 0.0
        language = between(batch["language in"], batch["language out"])
        language += between(batch["gradient of language out"], down)
        head = between(batch["language out"], batch["gradient of language out"])
        rest = between(batch["start"], batch["end"]) - vision - language - head
        return {"vision": vision, "language": language, "head and loss": head, "everything else": rest}
