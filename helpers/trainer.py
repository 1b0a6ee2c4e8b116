"""TRL's SFTTrainer with checkpoints that hold exactly what trains, and that resume exactly.

Trainer's own checkpoints of a full Qwen2-VL carry old key names (`visual.*`) and load non-strictly: the resumed model
is silently the base again. Saving the trainable weights alone, in fp32, is smaller and exact, for LoRA as for a tower.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.vision_utils import get_vision_cu_seqlens
from trl import SFTConfig, SFTTrainer

from helpers import checkpoints, merge, parity, runs
from helpers.collate import IGNORED
from helpers.faults import ForgivingReporter, StopNotice, Stopped, explained
from helpers.model import check_one_way, keep_4bit_trainable
from helpers.trainlog import LossLog, ProgressBar, read_log

__all__ = ["COMPLETE", "WEIGHTS", "BoxTrainer", "LossLog", "ProgressBar", "load_trainable", "read_log"]

WEIGHTS = "trainable.safetensors"
# What every training of this project has in its SFTConfig.
COMMON: dict[str, Any] = {
    "remove_unused_columns": False,  # the collator reads rows of the project's schema
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # a loss that is no number must be seen
    "save_total_limit": 2,
    "dataloader_num_workers": 4 if torch.cuda.is_available() else 0,  # processes that open pictures
    "use_cpu": not torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
}
COMPLETE = checkpoints.COMPLETE


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
            checkpoints.drop_half_checkpoints(self.folder)
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
        """TRL's own; features that a frozen tower has made before (`SeenCollator`) take the place of pictures.

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
            checkpoints.mark_complete(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a face of its own in each library
            free = shutil.disk_usage(self.folder).free / 2**30
            shutil.rmtree(folder, ignore_errors=True)  # half of it: it would never be loaded, and takes room
            last = checkpoints.last_checkpoint(self.folder)
            raise OSError(f"{folder} cannot be written ({error}; {free:.2f} GiB were free). Make room there; the same "
                          f"command goes on from {Path(last).name if last else 'the start'}.") from error
        finally:
            self.args.save_total_limit = kept
        checkpoints.drop_old_checkpoints(self.folder, kept, self.state.best_model_checkpoint)

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

    def save_result(self, folder: Path, keep: str = "last") -> None:
        """Write what was trained, adapter or whole model, to `folder`: the last step's weights or the `best`'s."""
        if keep == "best":
            print(f"the best IoU during training, {self.state.best_metric:.3f}, was at step {self.load_best()}: kept")
        tuned = self.accelerator.unwrap_model(self.model)
        if runs.is_main():
            if isinstance(tuned, PeftModel):
                tuned.save_pretrained(folder)
                self.processing_class.save_pretrained(folder)
            else:
                merge.save_whole(tuned, self.processing_class, folder)
            parity.write(folder, self.made_with or {}, self.base)
        self.accelerator.wait_for_everyone()

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
