"""TRL's trainers with checkpoints that hold exactly what trains, that resume exactly, and endings that say why.

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, DataLoader, Sampler
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from transformers.vision_utils import get_vision_cu_seqlens
from trl import SFTTrainer

from helpers import data, evaluate, merge, parity, predict, runs, speed
from helpers.collate import IGNORED
from helpers.model import keep_4bit_trainable
from helpers.processes import is_main, take_signals
from helpers.runs import progress_bar, read_json, write_json, write_text
from helpers.settings import Run

WEIGHTS = "trainable.safetensors"
COMPLETE = "complete"  # in a checkpoint: {file: bytes}, written last; without it one was cut off and is never loaded
WINDOW = 20  # steps whose mean loss tells a trend
WORSE = 1.5  # this many times the mean of the first WINDOW steps: the training has diverged
# What every training of this project has in its SFTConfig.
COMMON: dict[str, Any] = {
    "remove_unused_columns": False,  # the collator reads rows of the project's schema
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # a loss that is no number must show
    "save_total_limit": 2,
    "dataloader_num_workers": 4 if torch.cuda.is_available() else 0,  # processes that open pictures
    "use_cpu": not torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
}


class ExactTrainer(Trainer):
    """What `SFTTrainer` (`BoxTrainer`) and `GRPOTrainer` (`reward.RewardTrainer`) get: one checkpoint format for every
    recipe, and errors that say what went wrong; see the module's docstring.

    Args:
        made_with: `parity.record` of this run, and base: `parity.base_of` the frozen model. They go into every
            checkpoint, and a checkpoint made with others is refused. Without them nothing is stored or checked.
    """

    def __init__(self, model: torch.nn.Module, args: TrainingArguments, *, made_with: dict[str, Any] | None = None,
                 base: dict[str, str] | None = None, **kwargs):
        args._n_gpu = min(args.n_gpu, 1)  # Trainer counts all visible GPUs, and would use DataParallel on them
        super().__init__(model, args=args, **kwargs)
        keep_4bit_trainable(self.model)  # it may generate between two steps
        self.made_with, self.base, self.notice, self.folder = made_with, base, StopNotice(), Path(str(args.output_dir))
        self.kept, args.save_total_limit = args.save_total_limit, None  # no old checkpoint goes before a new is whole
        for own in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(own)
        for one in self.callback_handler.callbacks:
            if one.__module__.startswith("transformers.integrations"):
                let_fail(one)
        for callback in (ProgressBar(), self.notice):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trainer's own, with a folder cleared of half checkpoints, W&B's run continued, errors in a sentence.

        Raises Stopped (a SystemExit) after the checkpoint that a SIGTERM or SIGINT called for.
        """
        if self.args.should_save:
            for path in sort_checkpoints(str(self.folder)):
                if not is_complete(path):
                    shutil.rmtree(path)
        if resume_from_checkpoint and is_main():
            print(f"{self.folder.name} goes on from {Path(resume_from_checkpoint).name}")
        if "wandb" in self.args.report_to:
            runs.continue_wandb(self.folder)
        try:
            with self.notice.watching():
                result = super().train(resume_from_checkpoint, **kwargs)
        except torch.OutOfMemoryError as error:
            numbers = str(error).partition(" Of the allocated")[0]  # behind it PyTorch's advice, which is not ours
            raise torch.OutOfMemoryError(f"out of GPU memory at step {self.state.global_step + 1} "
                                         f"({numbers.rstrip('.')}): {advice(self)}") from error
        if self.notice.came:
            raise Stopped(f"{self.notice.came} at step {self.state.global_step} of {self.state.max_steps}: "
                          f"checkpoint-{self.state.global_step} is saved, and the same command goes on from there.")
        return result

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:  # every process comes here
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trainable().items()}
            save_file(weights, Path(str(output_dir), WEIGHTS), metadata={"format": "pt"})

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's own, then what it must be used with, and last of all `complete`, with every file's size."""
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        (folder / COMPLETE).unlink(missing_ok=True)
        try:
            Trainer._save_checkpoint(self, model, trial)  # TRL's own only adds a model card to each
            if not self.args.should_save:
                return
            if self.made_with:
                parity.write(folder, self.made_with, self.base)
            write_json(folder / COMPLETE, {path.name: path.stat().st_size for path in folder.iterdir()})
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a face of its own in each library
            free = shutil.disk_usage(self.folder).free / 2**30
            shutil.rmtree(folder, ignore_errors=True)  # half of it: it would never be loaded, and takes room
            raise OSError(f"{folder} cannot be written ({error}; {free:.2f} GiB were free). Make room there; "
                          f"{goes_on(self.folder)}.") from error
        rotate_checkpoints(str(self.folder), self.kept, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Copy a checkpoint's weights into those that train.

        Raises ParityError where it was made with something else, ValueError where names or shapes differ.
        """
        if self.made_with:
            parity.check(resume_from_checkpoint, self.made_with, self.base)
        own, saved = self._trainable(), load_file(Path(resume_from_checkpoint) / WEIGHTS)
        odd = sorted(name for name in {*own, *saved}
                     if name not in own or name not in saved or own[name].shape != saved[name].shape)
        if odd:
            raise ValueError(f"{resume_from_checkpoint} has other weights than the ones that train here, such as "
                             f"{odd[0]}; was it made by another recipe or rank?")
        with torch.no_grad():
            for name, weight in saved.items():
                own[name].copy_(weight)

    def save_result(self, folder: Path, keep: str = "last") -> None:
        """Write what was trained, adapter or whole model, to `folder`: the last step's weights, or (`best`) those of
        the step whose IoU was best (`IoUDuringTraining`)."""
        if keep == "best":
            step = self.state.best_global_step
            print(f"the best IoU during training, {self.state.best_metric:.3f}, was at step {step}: kept")
            self._load_from_checkpoint(str(self.folder / f"checkpoint-{step}"))
        tuned = self.accelerator.unwrap_model(self.model)
        if is_main():
            if isinstance(tuned, PeftModel):
                tuned.save_pretrained(folder, selected_adapters=["default"])
                self.processing_class.save_pretrained(folder)
            else:
                merge.save_whole(tuned, self.processing_class, folder)
            parity.write(folder, self.made_with or {}, self.base)
        self.accelerator.wait_for_everyone()


class BoxTrainer(ExactTrainer, SFTTrainer):
    """`SFTTrainer` on labels: what processes share, and features that were made before."""

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's own in one process; in several one that shares out the updates of one process (`UpdateShare`)."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return super().get_train_dataloader()
        args, rows, collator = self.args, self.train_dataset, self.data_collator
        share = UpdateShare(SeedableRandomSampler(rows), args.per_device_train_batch_size,
                            args.gradient_accumulation_steps, self.accelerator.process_index, processes)

        def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
            made = collator(batch)
            if "filler" in batch[0]:  # no label: its loss and its gradients are 0
                made["labels"] = torch.full_like(made["labels"], IGNORED)
            return made

        with_filler = ConcatDataset([rows, [rows[0] | {"filler": True}]])
        return DataLoader(with_filler, batch_sampler=share, num_workers=args.dataloader_num_workers,
                          collate_fn=collate, pin_memory=args.dataloader_pin_memory)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's own; features that a frozen tower has made before (`CachedFeaturesCollator`) take pictures' place.

        SDPA needs the pictures' lengths in each layer of the vision tower: on a GPU each would wait for the device, so
        they stay on the CPU. With a model spread over several GPUs two things of TRL 1.16 are put right: it divides
        a loss on the head's GPU by a count on the first one, and it starts its Triton kernels on the current GPU, where
        they do not wait for the head's (with losses of -inf). So the head's GPU is the current one, the count goes
        there, and the loss comes back to where Trainer adds it up. Without outputs: only an evaluation needs them.
        """
        if inputs["input_ids"].is_cuda and self.model.config.vision_config._attn_implementation == "sdpa":
            inputs["image_cu_seqlens"] = get_vision_cu_seqlens(inputs["image_grid_thw"].cpu())
        inputs = speed.with_features(inputs)
        place = self.accelerator.unwrap_model(self.model).get_output_embeddings().weight.device
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(place)
        with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
            return super().compute_loss(model, inputs, False, num_items_in_batch).to(self.args.device)


class UpdateShare(Sampler):
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

    def _batches(self, order: Sequence[int]) -> list[list[int]]:
        batches, size = [], self.batch_size * self.accumulation * self.processes
        for start in range(0, len(order), size):
            update = order[start : start + size]
            mine, longest = update[self.process :: self.processes], update[:: self.processes]
            batches += [list(mine[first : first + self.batch_size]) or [len(order)]
                        for first in range(0, len(longest), self.batch_size)]
        return batches

    def __len__(self) -> int:
        return len(self._batches(range(len(self.batch_sampler))))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches(list(self.batch_sampler)))


def is_complete(checkpoint: str | Path) -> bool:
    """Whether every file of a checkpoint has its size: neither a kill nor a crash of the machine has cut it off."""
    sizes = read_json(Path(checkpoint, COMPLETE))
    files = {name: Path(checkpoint, name) for name in sizes}
    return bool(sizes) and all(path.is_file() and path.stat().st_size == sizes[name] for name, path in files.items())


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint (its `complete` file is written last), or None."""
    return next(filter(is_complete, reversed(sort_checkpoints(str(folder)))), None)


def goes_on(folder: Path) -> str:
    last = last_checkpoint(folder)
    return f"the same command goes on from {Path(last).name if last else 'the start'}"


def advice(sft: ExactTrainer) -> str:
    """What to change so that a step takes less memory."""
    changes = []
    kept = [one.kept for one in sft.callback_handler.callbacks if isinstance(one, speed.KeepActivations)]
    if not sft.args.gradient_checkpointing or any(kept):
        changes.append("gradient_checkpointing=True keeps fewer activations, and goes on from the last checkpoint")
    if sft.args.per_device_train_batch_size > 1:
        changes.append("half of batch_size with twice the accumulation makes the same updates")
    pixels = dict(sft.processing_class.image_processor.size)["longest_edge"]
    changes.append(f"a max_pixels below {pixels} makes shorter sequences")
    return "; ".join(changes) + "; a smaller batch or max_pixels needs a run_name of its own."


class Stopped(SystemExit):
    """The training was told to stop and has saved; the message is the process's last word, its exit status 1."""


class StopNotice(TrainerCallback):
    """SIGTERM, Ctrl-C, a notebook's stop button or the end of the program that runs it: finish the step, save, stop.

    `came` names what came, and is empty where nothing did. Under a launcher all processes stop at the same step.
    """

    came = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT (where this is the main thread: Python hands it all signals) until the block ends.

        papermill dies of a SIGTERM at once, and its kernel within a second of it, in the middle of a step, because a
        thread of the kernel (`poller`) compares its parent. Until the block ends any parent is right for that thread.
        """
        kernels = sys.modules.get("ipykernel.kernelapp")
        poller = kernels.IPKernelApp.instance().poller if kernels and kernels.IPKernelApp.initialized() else None
        self.came, self.kernel_of = "", os.getppid() if poller else 0
        before = take_signals(self._on_signal) if threading.current_thread() is threading.main_thread() else {}
        if poller:
            parent, poller.parent_pid = poller.parent_pid, type("AnyProcess", (), {"__ne__": lambda *_: False})()
        try:
            yield
        finally:
            if poller:
                poller.parent_pid = parent
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
        if any(gather_object([self.came])):
            self.came = self.came or "another process was told to stop"
            control.should_save = control.should_training_stop = True


def let_fail(service: TrainerCallback) -> None:
    """Let a logging service (W&B, TensorBoard) fail: the training goes on without it, and says so once."""
    def forgiving(event: Callable) -> Callable:
        def call(*args, **kwargs) -> None:
            try:
                event(*args, **kwargs)
            except Exception as error:  # each service has its own
                print(f"{type(service).__name__.removesuffix('Callback')} fails ({type(error).__name__}: "
                      f"{str(error).strip()}): the training goes on without it, log.jsonl has the curve.")
                for name in events:
                    setattr(service, name, lambda *args, **kwargs: None)

        return call

    events = [name for name in dir(service) if name.startswith("on_")]
    for name in events:
        setattr(service, name, forgiving(getattr(service, name)))


class LossLog(TrainerCallback):
    """Append every logged step to `log.jsonl`, and stop the training when the loss is no number or diverges."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Begin with the checkpoint's own history: what a killed run had logged after it is gone."""
        if state.is_world_process_zero:
            write_text(self.path, "".join(map(_log_line, state.log_history)))

    def on_log(self, args, state, control, **kwargs) -> None:
        """Raises FloatingPointError, before a checkpoint of this step could be written."""
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(_log_line(state.log_history[-1]))
        fault = loss_fault(state.log_history)
        if fault:
            last = last_checkpoint(self.path.parent)
            good = f"{Path(last).name} is the last good checkpoint" if last else "no checkpoint was written yet"
            raise FloatingPointError(
                f"{fault} at step {state.global_step} of {state.max_steps}; {good} (in {self.path.parent}). Lower "
                f"learning_rate (now {args.learning_rate}) and give the new run a run_name of its own.")


def _log_line(logged: dict) -> str:
    """A line of log.jsonl; nothing for what Trainer logs at the end of a training."""
    return json.dumps({"step": logged["step"], **logged}) + "\n" if {"loss", "eval_iou"} & {*logged} else ""


def loss_fault(history: list[dict]) -> str:
    """What is wrong with the last logged loss or gradient, or nothing."""
    losses = [line["loss"] for line in history if "loss" in line and "reward" not in line]  # GRPO's moves around 0
    for name, key in (("loss", "loss"), ("size of the gradient", "grad_norm")):
        if not math.isfinite(history[-1].get(key) or 0):
            return f"the {name} is {history[-1][key]}"
    first, last = sum(losses[:WINDOW]) / WINDOW, sum(losses[-WINDOW:]) / WINDOW
    if len(losses) >= 2 * WINDOW and last > WORSE * first:
        return (f"the training diverges: the loss is {last:.3g} over the last {WINDOW} steps, and was {first:.3g} "
                f"over the first {WINDOW}")
    return ""


def read_log(path: Path) -> list[dict]:
    """The logged steps, `[{"step", "loss", "grad_norm", "learning_rate", ...}]`; a cut last line is dropped."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


class ProgressBar(ProgressCallback):
    """Trainer's own text bar with the loss on it, in place of a line, or a notebook's table, for every logged step."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.training_bar = progress_bar(state.max_steps, state.global_step, "training", "step",
                                         state.is_world_process_zero)
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)


class IoUDuringTraining(TrainerCallback):
    """Generate on a few pictures every `run.eval_steps` steps and after the last one; log their mean IoU as `eval_iou`.

    Args:
        selection: rows of which the first `run.eval_pictures` are used; never `val`: what is chosen by this number must
            not be reported on. Processes share them out.
        run: its `eval_steps`, `prompt`, `predict_batch_size`, `max_new_tokens`, and `keep`: with `best` a checkpoint is
            saved whenever the number is the best so far (the earlier of equal ones), protected from rotation;
            `ExactTrainer.save_result` takes it back at the end.

    One pass a picture, whatever `passes` is. The training goes on as if nothing had been generated: greedy decoding
    draws no random number.
    """

    def __init__(self, sft: ExactTrainer, selection: Dataset, run: Run):
        self.sft, self.run = sft, run
        self.rows = selection.select(range(min(run.eval_pictures, len(selection))))
        self.truth = data.truth_rows(self.rows)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Measure where it is time, log, and call for a checkpoint where this is the best so far."""
        if state.global_step % self.run.eval_steps and state.global_step < state.max_steps:
            return
        log_this_step, iou = control.should_log, self._measure()
        control.should_log = log_this_step  # or the step's loss would not be logged: Trainer resets it in `log`
        if self.run.keep == "best" and (state.best_metric is None or iou > state.best_metric):
            state.best_metric, state.best_global_step, control.should_save = iou, state.global_step, True

    def _measure(self) -> float:
        """Mean IoU (0-1) of the model as it is now; the same number in every process."""
        accelerator, model = self.sft.accelerator, self.sft.accelerator.unwrap_model(self.sft.model)
        mine = sorted(self.rows.shard(accelerator.num_processes, accelerator.process_index, contiguous=False),
                      key=lambda row: -row["image"].width * row["image"].height)
        generation = {"do_sample": False, "use_cache": True, "max_new_tokens": self.run.max_new_tokens}
        was_training = model.training
        model.eval()
        with accelerator.autocast(), torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
            batches = list(predict.generate_batches(model, self.sft.processing_class, mine, range(len(mine)),
                                                    self.run.prompt, generation, None, self.run.predict_batch_size))
        lines = gather_object([line for batch in batches for line in batch])
        iou = evaluate.score(self.truth, lines, resamples=0)["summary"]["mean_iou"]["value"]
        self.sft.log({"eval_iou": iou})  # in eval mode, in which TRL leaves its training metrics alone
        model.train(was_training)
        if accelerator.is_main_process:
            unstopped = sum(not line["stopped"] for line in lines)
            tqdm.write(f"step {self.sft.state.global_step}: mean IoU {iou:.3f} on {len(self.rows)} selection pictures"
                       + (f", {unstopped} completions never stopped" if unstopped else ""))
        return iou
