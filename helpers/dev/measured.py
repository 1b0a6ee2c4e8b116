"""pipeline.py, run as it is under a memory cap, with its calls measured into a file.

`python -m helpers.dev.measured EVENTS.jsonl CAP_GIB KILL_AT TRAININGS name=value ...` runs pipeline.py with the values.
CAP_GIB (0: none) bounds what PyTorch reserves on each GPU; KILL_AT (0: never) is the step after whose checkpoint the
process kills itself, as a power cut would; TRAININGS (0: never) is the number of trainings that end the run.
Each line of the file is one finished call, one step or one loss: `{"call", "seconds", "allocated", "reserved",
"result"}`, the memory being the call's peak in GiB on the fullest GPU. With several processes the first one writes.
"""

import functools
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
from accelerate import PartialState
from transformers import TrainerCallback

from helpers import merge, model, predict, processes, trainer

GIB = 2**30
PIPELINE = Path(__file__).resolve().parents[2] / "pipeline.py"
CALLS: dict[str, tuple] = {  # name in the file -> where pipeline.py finds it, and what of its value is a result
    "load": (model, "load", None),
    "nf4 layers": (model, "check_precision", len),
    "trainable": (model, "check_trainable", lambda table: {name: row["trainable"] for name, row in table.items()}),
    "train": (trainer.ExactTrainer, "train", None),
    "save checkpoint": (trainer.ExactTrainer, "_save_checkpoint", None),
    "load checkpoint": (trainer.ExactTrainer, "_load_from_checkpoint", None),
    "predict": (predict, "predict", len),
    "merge": (merge, "merge_adapter", lambda value: value[1]),  # None with memory=low
    "save model": (merge, "save_whole", None),
    "reload and compare": (merge, "check_reload", None),
}


class Events:
    """The file of finished calls. A call inside another adds its peak of memory to the outer one."""

    def __init__(self, path: Path, trainings: int):
        self.path, self.trainings, self.open = path, trainings, []

    def write(self, call: str, **values) -> None:
        if processes.is_main():
            with self.path.open("a") as file:
                file.write(json.dumps({"call": call, **values}) + "\n")

    def mark(self) -> float:
        """Add the peaks since the last mark to every open call; returns the time now, all GPUs having finished."""
        for card in model.gpus():
            torch.cuda.synchronize(card)
            for call in self.open:
                call[:] = max(call[0], torch.cuda.max_memory_allocated(card)), max(
                    call[1], torch.cuda.max_memory_reserved(card))
            torch.cuda.reset_peak_memory_stats(card)
        return time.perf_counter()

    def measured(self, call: str, work: Callable, result: Callable | None = None) -> Callable:
        """`work` that writes a line when it returns; `result` makes a JSON value of what it returned."""

        @functools.wraps(work)
        def wrapped(*args, **kwargs):
            start, peak = self.mark(), [0, 0]
            self.open.append(peak)
            value = work(*args, **kwargs)
            seconds = self.mark() - start
            self.open.pop()
            self.write(call, seconds=round(seconds, 3), allocated=round(peak[0] / GIB, 2),
                       reserved=round(peak[1] / GIB, 2), **({"result": result(value)} if result else {}))
            self.trainings -= call == "train"
            if call == "train" and not self.trainings:
                processes.leave()
                raise SystemExit
            return value

        return wrapped


class Watch(TrainerCallback):
    """Writes each step's seconds and loss; kills the process after the checkpoint of step `kill_at`."""

    def __init__(self, events: Events, kill_at: int):
        self.events, self.kill_at = events, kill_at

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.last = self.events.mark()
        self.events.write("training", result={
            "step": state.global_step, "n_gpu": args.n_gpu, "micro_batch": args.per_device_train_batch_size,
            "checkpointing": args.gradient_checkpointing})

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = self.events.mark()
        self.events.write("step", seconds=round(now - self.last, 3))
        self.last = now

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.events.write("loss", result=logs["loss"])

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.kill_at:
            PartialState().wait_for_everyone()
            if processes.is_main():
                os.kill(os.getpid(), signal.SIGKILL)
        self.last = self.events.mark()


def main(file: str, cap_gib: str, kill_at: str, trainings: str, *parameters: str) -> None:
    for card in model.gpus() if float(cap_gib) else []:
        whole = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(float(cap_gib) * GIB / whole, card)
    events = Events(Path(file), int(trainings))
    for call, (place, name, result) in CALLS.items():
        setattr(place, name, events.measured(call, getattr(place, name), result))
    transformers.trainer.DEFAULT_CALLBACKS.append(Watch(events, int(kill_at)))
    sys.argv = ["pipeline.py", *parameters]
    events.measured("pipeline", runpy.run_path)(str(PIPELINE), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
