"""What comes from outside while a model trains: a notice to stop, too little memory, a dead worker, a lost network."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from helpers import checkpoints
from helpers.model import KeepActivations
from helpers.settings import take_signals


class Stopped(SystemExit):
    """The training was told to stop and has saved; the message is the process's last word, its exit status 1."""


class StopNotice(TrainerCallback):
    """SIGTERM, Ctrl-C, a notebook's stop button or the end of the program that runs it: finish the step, save, stop.

    `came` names what came, and is empty where nothing did. Under a launcher all processes stop at the same step.
    """

    came = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT (where this is the main thread: Python hands it all signals) until the block ends."""
        self.came, poller = "", _kernel_poller()
        self.kernel_of = os.getppid() if poller else 0
        before = take_signals(self._on_signal) if threading.current_thread() is threading.main_thread() else {}
        try:
            with _kernel_outlives_its_parent(poller) if before and poller else contextlib.nullcontext():
                yield
        finally:
            for number, taker in before.items():
                signal.signal(number, taker)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.came = signal.Signals(number).name
        if number == signal.SIGINT:  # a person waits; `print` is not for a signal's handler
            os.write(2, b"\nSIGINT: this step is finished and saved first; a second one ends at once, without.\n")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """A whole step is done: the one point at which weights, optimizer and data order agree."""
        if self.kernel_of and os.getppid() != self.kernel_of:
            self.came = self.came or "the program that ran this notebook has ended"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            anyone = torch.tensor(float(bool(self.came)), device=args.device)
            torch.distributed.all_reduce(anyone, torch.distributed.ReduceOp.MAX)
            self.came = self.came or ("another process was told to stop" if anyone.item() else "")
        if self.came:
            control.should_save = control.should_training_stop = True


def _kernel_poller() -> Any:
    """In a notebook's kernel its thread that looks whether the program that started it still runs, else None."""
    kernels = sys.modules.get("ipykernel.kernelapp")
    return kernels.IPKernelApp.instance().poller if kernels and kernels.IPKernelApp.initialized() else None


class _AnyProcess:
    """Stands for a process id, and differs from none."""

    def __ne__(self, other: object) -> bool:
        return False


@contextlib.contextmanager
def _kernel_outlives_its_parent(poller: Any) -> Iterator[None]:
    """papermill dies of a SIGTERM at once, and its kernel within a second of it, in the middle of a step.

    Until the block ends any parent is right for the kernel; `StopNotice` looks itself, after each step.
    """
    parent, poller.parent_pid = poller.parent_pid, _AnyProcess()
    try:
        yield
    finally:
        poller.parent_pid = parent


class ForgivingReporter(TrainerCallback):
    """A logging service (W&B, TensorBoard) that may fail: the training goes on without it, and says so once."""

    def __init__(self, inner: TrainerCallback):
        self.inner: TrainerCallback | None = inner

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def event(*args: Any, **kwargs: Any) -> None:
            if self.inner is None:
                return
            try:
                getattr(self.inner, name)(*args, **kwargs)
            except Exception as error:  # each service has its own
                service = type(self.inner).__name__.removesuffix("Callback")
                print(f"{service} fails ({type(error).__name__}: {str(error).strip()}): the training goes on without "
                      "it, log.jsonl has the curve.")
                self.inner = None

        return event


def explained(error: Exception, sft: Any) -> Exception | None:
    """The error that says in one sentence what to do, with this run's numbers; None where there is nothing to add."""
    last = checkpoints.last_checkpoint(sft.folder)
    goes_on = f"The same command goes on from {last.rsplit('/', 1)[-1] if last else 'the start'}."
    if isinstance(error, torch.OutOfMemoryError):
        return torch.OutOfMemoryError(f"out of GPU memory at step {sft.state.global_step + 1} ({_gpu_memory()}): "
                                      f"{_smaller(sft)}")
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        first = str(error).split("\n")[0]
        return RuntimeError(f"a process that reads the data died at step {sft.state.global_step + 1} ({first}), most "
                            f"often for want of memory or of room in /dev/shm. {goes_on}")
    return _bad_picture(error, sft)


def _smaller(sft: Any) -> str:
    """What to change so that a step takes less memory: the effective batch stays the same."""
    args, pixels = sft.args, dict(sft.processing_class.image_processor.size)["longest_edge"]
    batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    advice = []
    kept = [one.layers for one in sft.callback_handler.callbacks if isinstance(one, KeepActivations)]
    if any(kept) or not args.gradient_checkpointing:
        advice.append("gradient_checkpointing=True keeps fewer activations, and goes on from the last checkpoint")
    if batch > 1:
        advice.append(f"batch_size={batch // 2} and accumulation={-(-steps * batch // (batch // 2))} (now {batch} and "
                      f"{steps}) give the same effective batch")
    advice.append(f"a max_pixels below {pixels} makes shorter sequences")
    return "; ".join(advice) + "; a smaller batch needs a run_name of its own."


def _gpu_memory() -> str:
    if not torch.cuda.is_available():
        return "no GPU is visible"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB are in use here, {free / 2**30:.1f} of " \
           f"{total / 2**30:.1f} GiB are free"


def _bad_picture(error: Exception, sft: Any) -> Exception | None:
    """Pictures are read to their end before a training starts; one that no longer is whole gets its name said."""
    from datasets import Image
    from PIL import UnidentifiedImageError

    from helpers.data.pictures import picture_facts

    if not isinstance(error, (UnidentifiedImageError, OSError)) or "image" not in sft.train_dataset.column_names:
        return None
    for row in sft.train_dataset.cast_column("image", Image(decode=False)):
        fault = picture_facts(row["image"])["error"]
        if fault:
            return ValueError(f"the picture of image_id={row['image_id']!r} can no longer be read ({fault}), and could "
                              "be when the run started; mend or remove it, and start again.")
    return None
