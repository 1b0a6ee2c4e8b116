"""What comes from outside while a model trains: a notice to stop, too little memory, a dead worker, a lost network."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback

from helpers import checkpoints
from helpers.model import KeepActivations


class Stopped(SystemExit):
    """The training was told to stop and has saved; the message is the process's last word, its exit status 1."""


class StopNotice(TrainerCallback):
    """SIGTERM, or in a notebook the end of the program that runs it: finish the step, save a checkpoint, stop.

    `came` names what came, and is empty where nothing did. Under a launcher all processes stop at the same step.
    """

    came = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take SIGTERM (where this is the main thread) until the block ends."""
        self.came, self.kernel_of = "", _kernel_parent()
        try:
            before = signal.signal(signal.SIGTERM, self._on_signal)
        except ValueError:  # Python hands signals to the main thread alone
            yield
            return
        try:
            with _kernel_outlives_its_parent() if self.kernel_of else contextlib.nullcontext():
                yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.came = signal.Signals(number).name

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


def _kernel_parent() -> int:
    """In a notebook's kernel the process that started it (JupyterLab, papermill), else 0."""
    kernels = sys.modules.get("ipykernel.kernelapp")
    return os.getppid() if kernels and kernels.IPKernelApp.initialized() else 0


def _kernel_outlives_its_parent() -> Any:
    """papermill dies of a SIGTERM at once, and its kernel within a second of it, in the middle of a step.

    While this holds the kernel's own watch sees its parent alive; `StopNotice` looks itself, after each step.
    """
    from ipykernel import parentpoller

    parent = os.getppid()
    return mock.patch.object(parentpoller, "os", SimpleNamespace(getppid=lambda: parent, _exit=os._exit))


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
