"""TRL's SFTTrainer with checkpoints that hold exactly what trains, that resume exactly, and endings that say why.

Trainer's own checkpoints of a full Qwen2-VL carry old key names (`visual.*`) and load non-strictly: the resumed model
is silently the base again. Saving the trainable weights alone, in fp32, is smaller and exact, for LoRA as for a tower.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.vision_utils import get_vision_cu_seqlens
from trl import SFTConfig, SFTTrainer

from helpers import data, evaluate, parity, predict, runs
from helpers.collate import IGNORED
from helpers.files import read_json, write_json, write_text
from helpers.model import check_one_way, keep_4bit_trainable
from helpers.progress import progress_bar
from helpers.settings import take_signals
from helpers.speed import KeepActivations

WEIGHTS = "trainable.safetensors"
COMPLETE = "complete"  # in a checkpoint: {file: bytes}, written last; without it one was cut off and is never loaded
WINDOW = 20  # steps whose mean loss tells a trend
WORSE = 1.5  # this many times the mean of the first WINDOW steps: the training has diverged


class BoxTrainer(SFTTrainer):
    """`SFTTrainer` with one checkpoint format for every recipe, that says what went wrong; see the module's docstring.

    Args:
        made_with: `parity.record` of this run, and base: `parity.base_of` the frozen model. They go into every
            checkpoint, and a checkpoint made with others is refused. Without them nothing is stored or checked.
    """

    def __init__(self, model: torch.nn.Module, args: SFTConfig, *, made_with: dict[str, Any] | None = None,
                 base: dict[str, str] | None = None, **kwargs):
        args._n_gpu = min(args.n_gpu, 1)  # Trainer counts all GPUs it sees, and would use DataParallel on them
        super().__init__(model, args=args, **kwargs)
        check_one_way(self.model, self.args.n_gpu)
        keep_4bit_trainable(self.model)  # it may generate between two steps
        self.made_with, self.base = made_with, base
        for own in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(own)
        self.callback_handler.callbacks = [
            ForgivingReporter(one) if one.__module__.startswith("transformers.integrations") else one
            for one in self.callback_handler.callbacks]
        self.notice = StopNotice()
        for callback in (ProgressBar(), self.notice):
            self.add_callback(callback)

    @property
    def folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trainer's own, with a folder cleared of half checkpoints, W&B's run continued, faults said in a sentence.

        Raises Stopped (a SystemExit) after the checkpoint that a SIGTERM asked for.
        """
        if self.args.should_save:
            drop_half_checkpoints(self.folder)
        if resume_from_checkpoint and runs.is_main():
            print(f"{self.folder.name} goes on from {Path(resume_from_checkpoint).name}")
        if "wandb" in self.args.report_to:
            runs.continue_wandb(self.folder)
        try:
            with self.notice.watching():
                result = super().train(resume_from_checkpoint, **kwargs)
        except Exception as error:
            clearer = explained(error, self)
            if clearer is None:
                raise
            raise clearer from error
        if self.notice.came:
            raise Stopped(f"{self.notice.came} at step {self.state.global_step} of {self.state.max_steps}: "
                          f"checkpoint-{self.state.global_step} is saved, and the same command goes on from there.")
        return result

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's own in one process; in several one that shares out the updates of one process (`UpdateShare`)."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return super().get_train_dataloader()
        args, rows, collator = self.args, self.train_dataset, self.data_collator
        share = UpdateShare(SeedableRandomSampler(rows), args.per_device_train_batch_size,
                            args.gradient_accumulation_steps, self.accelerator.process_index, processes)
        return DataLoader(WithFiller(rows), batch_sampler=share, num_workers=args.dataloader_num_workers,
                          collate_fn=lambda batch: ignore_filler(batch, collator(batch)),
                          pin_memory=args.dataloader_pin_memory)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's own; features that a frozen tower has made before (`CachedFeaturesCollator`) take pictures' place.

        SDPA asks each layer of the vision tower for the pictures' lengths: on a GPU each would wait for the device, so
        they stay on the CPU. With a model spread over several GPUs two things of TRL 1.16 are put right: it divides
        a loss on the head's GPU by a count on the first one, and it starts its Triton kernels on the current GPU, where
        they do not wait for the head's (losses of -inf were seen). So the head's GPU is the current one, the count goes
        there, and the loss comes back to where Trainer adds it up.
        """
        if inputs["input_ids"].is_cuda and self.model.config.vision_config._attn_implementation == "sdpa":
            inputs["image_cu_seqlens"] = get_vision_cu_seqlens(inputs["image_grid_thw"].cpu())
        features = inputs.pop("image_features", None)
        if features is not None:
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=(features,))}
        place = self.accelerator.unwrap_model(self.model).get_output_embeddings().weight.device
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(place)
        with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
            computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:  # only an evaluation asks for them, and TRL runs the model a second time for their logits
            return computed[0].to(self.args.device), computed[1]
        return computed.to(self.args.device)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trainable().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's own, then what it must be used with, and last of all `complete`, with every file's size."""
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        (folder / COMPLETE).unlink(missing_ok=True)
        kept, self.args.save_total_limit = self.args.save_total_limit, None  # no old one goes before the new is whole
        try:
            super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's own only adds a model card to each
            if not self.args.should_save:
                return
            if self.made_with:
                parity.write(folder, self.made_with, self.base)
            mark_complete(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a face of its own in each library
            free = shutil.disk_usage(self.folder).free / 2**30
            shutil.rmtree(folder, ignore_errors=True)  # half of it: it would never be loaded, and takes room
            last = last_checkpoint(self.folder)
            raise OSError(f"{folder} cannot be written ({error}; {free:.2f} GiB were free). Make room there; the same "
                          f"command goes on from {Path(last).name if last else 'the start'}.") from error
        finally:
            self.args.save_total_limit = kept
        drop_old_checkpoints(self.folder, kept, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.made_with:
            parity.check(resume_from_checkpoint, self.made_with, self.base)
        load_trainable(self._trainable(), Path(resume_from_checkpoint))

    def load_best(self) -> int:
        """Give the model the weights of the step whose `eval_iou` was best, from its checkpoint; returns the step.

        Raises ValueError where no checkpoint was kept for its score.
        """
        step = self.state.best_global_step
        if not step:
            raise ValueError("no checkpoint was kept for its score; train with IoUDuringTraining(keep_best=True).")
        load_trainable(self._trainable(), self.folder / f"checkpoint-{step}")
        return step

    def create_model_card(self, *args, **kwargs) -> None:
        """None here: the run's manifest says what a card would."""


class UpdateShare(torch.utils.data.Sampler):
    """The batches of one of several processes that together make the updates which one process would make.

    An update is `batch_size` x `accumulation` x `processes` rows in the order of one process, the epoch's last one
    what is left. Every process makes equally many batches of it, as DDP needs; where nothing is left for one, its batch
    is a filler, numbered past the last row. accelerate's own sharding would repeat rows there, and train them twice.

    Args:
        order: row numbers, anew in each epoch, alike in all processes.
    """

    def __init__(self, order: SeedableRandomSampler, batch_size: int, accumulation: int, process: int, processes: int):
        self.batch_sampler = order  # Trainer sets the epoch of an attribute of this name
        self.set_epoch = order.set_epoch
        self.batch_size, self.accumulation = batch_size, accumulation
        self.process, self.processes = process, processes

    def _batches(self, rows: int) -> int:
        return math.ceil(rows / (self.batch_size * self.processes))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.batch_sampler), self.batch_size * self.accumulation * self.processes)
        return whole * self.accumulation + self._batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order, size = list(self.batch_sampler), self.batch_size * self.accumulation * self.processes
        for start in range(0, len(order), size):
            update = order[start : start + size]
            mine = update[self.process :: self.processes]
            for number in range(self._batches(len(update))):
                yield mine[number * self.batch_size : (number + 1) * self.batch_size] or [len(order)]


class WithFiller(torch.utils.data.Dataset):
    """`rows`, and behind the last of them a filler: the first row again, marked, for `ignore_filler`."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        return self.rows[number] if number < len(self.rows) else self.rows[0] | {"filler": True}


def ignore_filler(rows: list[dict], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`batch`, without a label where it was made of a filler: its loss and its gradients are 0."""
    if "filler" in rows[0]:
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    return batch


def load_trainable(parameters: dict[str, torch.nn.Parameter], checkpoint: Path) -> None:
    """Copy a checkpoint's weights into `parameters` (`{name: parameter}`).

    Raises ValueError when names or shapes are not exactly the same.
    """
    saved = load_file(checkpoint / WEIGHTS)
    shapes = {name: tuple(weight.shape) for name, weight in parameters.items()}
    if shapes != {name: tuple(weight.shape) for name, weight in saved.items()}:
        odd = sorted(set(shapes) ^ set(saved)) or [name for name in saved if shapes[name] != tuple(saved[name].shape)]
        raise ValueError(f"{checkpoint} holds other weights than the ones that train here, such as {odd[0]}; was it "
                         "made by another recipe or rank?")
    with torch.no_grad():
        for name, weight in saved.items():
            parameters[name].copy_(weight)


def mark_complete(checkpoint: Path) -> None:
    """Say that a checkpoint is whole: every file's size, so that one which a crash has cut shows too."""
    write_json(checkpoint / COMPLETE, {path.name: path.stat().st_size for path in checkpoint.iterdir()})


def is_complete(checkpoint: Path) -> bool:
    sizes = read_json(checkpoint / COMPLETE)
    return bool(sizes) and all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
                               for name, size in sizes.items())


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the newest last."""
    return sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint (its `complete` file is written last), or None."""
    whole = [path for path in checkpoints(folder) if is_complete(path)]
    return str(whole[-1]) if whole else None


def drop_half_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a kill has cut off."""
    for path in checkpoints(folder):
        if not is_complete(path):
            shutil.rmtree(path)


def drop_old_checkpoints(folder: Path, keep: int | None, best: str | None) -> None:
    """Keep `keep` checkpoints: the newest, and among them the one that is `best` (its path) by its score."""
    others = [path for path in checkpoints(folder) if str(path) != best]
    room = max(1, (keep or len(others)) - bool(best and Path(best).is_dir()))
    for path in others[:-room]:
        (path / COMPLETE).unlink(missing_ok=True)  # first: what is half removed must not look whole
        shutil.rmtree(path)


class LossLog(TrainerCallback):
    """Append every logged step to `log.jsonl`, and stop the training when the loss is no number or diverges."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Drop what a killed run had logged after its last checkpoint."""
        kept = [line for line in read_log(self.path) if line["step"] <= state.global_step] if state.global_step else []
        self.losses = [line["loss"] for line in kept if "loss" in line]
        if state.is_world_process_zero:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Raises FloatingPointError, before a checkpoint of this step could be written."""
        if not logs or not {"loss", "eval_iou"} & set(logs):
            return
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        fault = self._fault(logs)
        if fault:
            last = last_checkpoint(self.path.parent)
            good = f"{Path(last).name} is the last good checkpoint" if last else "no checkpoint was written yet"
            raise FloatingPointError(
                f"{fault} at step {state.global_step} of {state.max_steps}; {good} (in {self.path.parent}). Lower "
                f"learning_rate (now {args.learning_rate}) and give the new run a run_name of its own.")

    def _fault(self, logs: dict) -> str:
        """What is wrong with this step's loss or gradient, or nothing."""
        if "loss" not in logs:
            return ""
        self.losses.append(logs["loss"])
        for name, value in (("loss", logs["loss"]), ("size of the gradient", float(logs.get("grad_norm") or 0))):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        first, last = sum(self.losses[:WINDOW]) / WINDOW, sum(self.losses[-WINDOW:]) / WINDOW
        if len(self.losses) >= 2 * WINDOW and last > WORSE * first:
            return (f"the training diverges: the loss is {last:.3g} over the last {WINDOW} steps, and was {first:.3g} "
                    f"over the first {WINDOW}")
        return ""


def read_log(path: Path) -> list[dict]:
    """The logged steps, `[{"step", "loss", "grad_norm", "learning_rate", ...}]`; a cut last line is dropped."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class ProgressBar(TrainerCallback):
    """One text bar with the loss, the same in a terminal, in JupyterLab and in papermill's log.

    It stands in for Trainer's own, which prints every logged step, or a table of them in a notebook.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = progress_bar(state.max_steps, state.global_step, "training", "step", state.is_world_process_zero)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


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
            with contextlib.suppress(OSError):  # `| tee` has ended by the same Ctrl-C
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
    last = last_checkpoint(sft.folder)
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


class IoUDuringTraining(TrainerCallback):
    """Generate on a few pictures every `every` steps and after the last one; log their mean IoU as `eval_iou`.

    Args:
        sft: the trainer, whose log gets the number (so W&B, TensorBoard and `log.jsonl` do).
        rows: a `datasets.Dataset` of the project's schema, from `selection` and never from `val`: what is chosen by
            this number must not be reported on. The processes share the pictures out.
        every: steps between two measurements.
        keep_best: save a checkpoint whenever the number is the best so far (the earlier of equal ones), protected
            from rotation; `BoxTrainer.load_best` takes it back at the end.
        generation: arguments of `predict.generate_lines`' `model.generate`, such as `max_new_tokens`.

    The training goes on as if nothing had been asked: greedy decoding draws no random number, and the model returns
    to its mode. Raises ValueError where no picture of `rows` has a box, because then there is no IoU.
    """

    def __init__(self, sft: BoxTrainer, rows, prompt: str, *, every: int, batch_size: int, keep_best: bool = False,
                 **generation):
        self.sft, self.rows, self.prompt, self.every = sft, rows, prompt, every
        self.batch_size, self.keep_best = batch_size, keep_best
        self.generation = generation | {"do_sample": False, "use_cache": True}
        self.truth = data.truth_rows(rows)
        if not any(row["objects"]["bbox"] for row in self.truth):
            raise ValueError(f"none of the {len(rows)} pictures for the IoU during training has a box; take more.")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Measure where it is time, log, and ask for a checkpoint where this is the best so far."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        log_this_step, iou = control.should_log, self._measure()
        control.should_log = log_this_step  # or the step's loss would not be logged: Trainer resets it in `log`
        if self.keep_best and (state.best_metric is None or iou > state.best_metric):
            state.best_metric, state.best_global_step, control.should_save = iou, state.global_step, True

    def _measure(self) -> float:
        """Mean IoU (0-1) of the model as it is now; the same number in every process."""
        accelerator, model = self.sft.accelerator, self.sft.accelerator.unwrap_model(self.sft.model)
        mine = range(len(self.rows))[accelerator.process_index :: accelerator.num_processes]
        was_training, lines = model.training, []
        model.eval()
        try:
            for start in range(0, len(mine), self.batch_size):
                batch = [self.rows[i] for i in mine[start : start + self.batch_size]]
                with accelerator.autocast():
                    lines += predict.generate_lines(model, self.sft.processing_class, batch, self.prompt,
                                                    self.generation)
            lines = gather_object(lines)
            score = evaluate.score(self.truth, lines, resamples=0)
            iou = score["summary"]["mean_iou"]["value"]
            self.sft.log({"eval_iou": iou})  # in eval mode, in which TRL leaves its training metrics alone
        finally:
            model.train(was_training)
        if accelerator.is_main_process:
            unstopped = sum(not line["stopped"] for line in lines)
            tqdm.write(f"step {self.sft.state.global_step}: mean IoU {iou:.3f} on {len(self.rows)} selection pictures"
                       + (f", {unstopped} answers never stopped" if unstopped else ""))
        return iou
