"""TRL's SFTTrainer with checkpoints that hold exactly what trains, and that resume exactly.

Trainer's own checkpoints of a full Qwen2-VL carry old key names (`visual.*`) and load non-strictly: the resumed model
is silently the base again. Saving the trainable weights alone, in fp32, is smaller and exact, for LoRA as for a tower.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from trl import SFTConfig, SFTTrainer

from helpers.model import check_one_way
from helpers.progress import progress_bar

WEIGHTS = "trainable.safetensors"
COMPLETE = "complete"  # written last: a checkpoint without it was cut off and is never loaded


class BoxTrainer(SFTTrainer):
    """`SFTTrainer` with one checkpoint format for every recipe; see the module's docstring."""

    def __init__(self, model: torch.nn.Module, args: SFTConfig, **kwargs):
        args._n_gpu = min(args.n_gpu, 1)  # Trainer counts all GPUs it sees, and would use DataParallel on them
        super().__init__(model, args=args, **kwargs)
        check_one_way(self.model, self.args.n_gpu)
        for own in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(own)
        self.add_callback(ProgressBar())

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trainable().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    def _save_checkpoint(self, model, trial) -> None:
        super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's own only adds a model card to each
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_trainable(self._trainable(), Path(resume_from_checkpoint))

    def load_best(self) -> int:
        """Give the model the weights of the step whose `eval_iou` was best, from its checkpoint; returns the step.

        Raises ValueError where no checkpoint was kept for its score.
        """
        step = self.state.best_global_step
        if not step:
            raise ValueError("no checkpoint was kept for its score; train with IoUDuringTraining(keep_best=True).")
        load_trainable(self._trainable(), Path(self.args.output_dir) / f"checkpoint-{step}")
        return step

    def create_model_card(self, *args, **kwargs) -> None:
        """None here: the run's manifest says what a card would."""


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


class LossLog(TrainerCallback):
    """Append every logged step to `log.jsonl` and stop the training when the loss is no number."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Drop what a killed run had logged after its last checkpoint."""
        kept = [line for line in read_log(self.path) if line["step"] <= state.global_step] if state.global_step else []
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or not {"loss", "eval_iou"} & set(logs):
            return
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if not math.isfinite(logs.get("loss", 0)):
            raise FloatingPointError(f"the loss is {logs['loss']} at step {state.global_step}; lower learning_rate "
                                     f"(now {args.learning_rate}) and start again: checkpoints before it are kept.")


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
