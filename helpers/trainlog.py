"""What a training tells while it runs: the loss in log.jsonl, a bar; and a loss that goes wrong ends it."""

import json
import math
from pathlib import Path

from transformers import TrainerCallback

from helpers import checkpoints
from helpers.runs import progress_bar, write_text

WINDOW = 20  # steps whose mean loss tells a trend
WORSE = 1.5  # this many times the mean of the first WINDOW steps: the training has diverged


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
            last = checkpoints.last_checkpoint(self.path.parent)
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
