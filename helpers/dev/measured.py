"""pipeline.py, run as it is under a memory cap, each of its steps timed into a file.

`python -m helpers.dev.measured EVENTS.jsonl CAP_GIB KILL_AT TRAININGS name=value ...` runs pipeline.py with the values.
CAP_GIB (0: none) bounds what PyTorch reserves on each GPU; KILL_AT (0: never) is the step after whose checkpoint the
process kills itself, as a power cut would; TRAININGS (0: never) is how many trainings end the run. Each finished call
is one JSON line: `{"call", "seconds", "allocated", "reserved" (GiB at its peak, its own, on the fullest GPU), ...}`.
Under torchrun the first process writes.
"""

import contextlib
import functools
import itertools
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import Qwen2VLForConditionalGeneration, TrainerCallback

from helpers import merge, model, predict, runs, trainer
from helpers.settings import is_main

GIB = 2**30
PIPELINE = Path(__file__).resolve().parents[2] / "pipeline.py"


class Events:
    """The file of finished calls. A call inside another adds its peak to the outer one."""

    def __init__(self, path: Path):
        self.path, self.open = path, []

    def write(self, **event) -> None:
        if is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(event) + "\n")

    def _mark(self) -> None:
        """Add the peak since the last mark to every open call, and begin a new one."""
        if torch.cuda.is_available():
            cards = model.gpus()
            _wait()
            peaks = (max(map(torch.cuda.max_memory_allocated, cards)), max(map(torch.cuda.max_memory_reserved, cards)))
            for call in self.open:
                call[:] = map(max, call, peaks)
            for card in cards:
                torch.cuda.reset_peak_memory_stats(card)

    def timed(self, call: str, work: Callable, result: Callable = lambda value: None) -> Callable:
        """`work` that writes an event when it returns; `result` makes a JSON value of what it returned."""

        @functools.wraps(work)
        def wrapped(*args, **kwargs):
            self._mark()
            peak, start = [0, 0], time.perf_counter()
            self.open.append(peak)
            value = work(*args, **kwargs)
            self._mark()
            self.open.pop()
            self.write(call=call, seconds=round(time.perf_counter() - start, 2), allocated=round(peak[0] / GIB, 2),
                       reserved=round(peak[1] / GIB, 2), result=result(value))
            return value

        return wrapped


def watch(events: Events, trainings: int) -> None:
    """Time the pipeline's steps where it looks them up."""
    base = Qwen2VLForConditionalGeneration
    base.from_pretrained = staticmethod(events.timed("load", base.from_pretrained))
    model.check_precision = events.timed("nf4 layers", model.check_precision, len)
    model.check_trainable = events.timed("trainable", model.check_trainable, lambda table: {
        tower: row["trainable"] for tower, row in table.items()})
    own = trainer.BoxTrainer
    own.train = ending(alone(events.timed("train", own.train), events.path.with_name("training.lock")), trainings)
    own._save_checkpoint = events.timed("save checkpoint", own._save_checkpoint)
    own._load_from_checkpoint = events.timed("load checkpoint", own._load_from_checkpoint)
    predict.complete = events.timed("predict a batch", predict.complete, len)
    merge.merge_adapter = events.timed("merge", merge.merge_adapter, lambda value: value[1])
    merge.save_whole = events.timed("save model", merge.save_whole)
    merge.check_reload = events.timed("reload and compare", merge.check_reload)


def alone(work: Callable, lock: Path) -> Callable:
    """`work` that waits until no other process does work with the same lock: step times stay a process's own."""

    @functools.wraps(work)
    def wrapped(*args, **kwargs):
        with FileLock(lock) if is_main() else contextlib.nullcontext():
            return work(*args, **kwargs)

    return wrapped


def ending(work: Callable, count: int) -> Callable:
    """`work` that ends the program after it was done `count` times."""
    left = itertools.count(count - 1, -1)

    @functools.wraps(work)
    def wrapped(*args, **kwargs):
        value = work(*args, **kwargs)
        if next(left) == 0:
            runs.leave()
            raise SystemExit
        return value

    return wrapped


def clock(events: Events, kill_at: int) -> type[TrainerCallback]:
    """A callback that writes where a training begins, the seconds of each step, and kills where it should."""

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            events.write(call="train begins", step=state.global_step, n_gpu=args.n_gpu)

        def on_step_begin(self, args, state, control, **kwargs):
            _wait()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            _wait()
            events.write(call="step", step=state.global_step, seconds=round(time.perf_counter() - self.start, 3))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                events.write(call="loss", step=state.global_step, loss=logs["loss"])

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                events.write(call="killed", step=state.global_step)
                os.kill(os.getpid(), signal.SIGKILL)

    return Clock


def _wait() -> None:
    for card in model.gpus():
        torch.cuda.synchronize(card)


@torch.inference_mode()
def compare_merges(space: dict) -> dict[str, float]:
    """How far logits are from those of the model as it was trained: ||other - trained|| / ||trained||.

    `space` is the pipeline's namespace after its last cell, the one that its functions see. The same batch goes through
    the NF4 base with its adapter, the merged model that was shipped, and the adapter merged into the other base; keys
    are the names that `merge_base` takes. `rounding` is what the same shipped weights differ by when only the attention
    is computed otherwise: what is not above it says nothing.
    """
    inputs = {name: tensor for name, tensor in space["batch"].items() if name != "labels"}
    shipped = space["run"].merge_base
    other = {"dequantised": "full", "full": "dequantised"}[shipped]

    def logits(vlm: torch.nn.Module) -> torch.Tensor:
        out = vlm(**{name: tensor.to(vlm.device) for name, tensor in inputs.items()}).logits
        return out[inputs["attention_mask"].bool().to(out.device)].cpu().float()

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).norm() / other.norm()).item()

    found = {shipped: logits(space["merged"])}
    space["merged"].set_attn_implementation("eager" if model.attention() != "eager" else "sdpa")
    rounding = apart(logits(space.pop("merged")), found[shipped])  # and with its last name the model goes
    model.free_memory()
    trained = logits(space["load_trained"]())
    model.free_memory()
    found[other] = logits(space["merge_into"](other).to(torch.bfloat16))
    model.free_memory()
    return {kind: apart(found[kind], trained) for kind in ("dequantised", "full")} | {"rounding": rounding}


def main(file: str, cap_gib: str, kill_at: str, trainings: str, *parameters: str) -> None:
    events = Events(Path(file))
    events.write(call="start", at=time.time())
    for card in model.gpus() if float(cap_gib) else []:
        whole = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(float(cap_gib) * GIB / whole, card)
    watch(events, int(trainings))
    transformers.trainer.DEFAULT_CALLBACKS.append(clock(events, int(kill_at)))
    sys.argv = ["pipeline.py", *parameters]
    # run_path gives a copy, which would hold a model that its functions' own namespace has let go
    space = events.timed("pipeline", runpy.run_path)(str(PIPELINE), run_name="__main__")["load_base"].__globals__
    if space["merges"] and len(model.gpus()) < 2 and space["run"].memory != "low":  # merged on the CPU: slow there
        events.timed("compare", compare_merges, lambda value: value)(space)
    events.write(call="end", at=time.time())


if __name__ == "__main__":
    main(*sys.argv[1:])
