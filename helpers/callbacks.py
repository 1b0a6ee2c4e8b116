"""IoU while the model trains, on pictures of `selection`: a run that goes wrong is seen early, the best step kept."""

from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback

from helpers import data, evaluate, predict
from helpers.settings import Run
from helpers.trainer import BoxTrainer


class IoUDuringTraining(TrainerCallback):
    """Generate on a few pictures every `every` steps and after the last one; log their mean IoU as `eval_iou`.

    Args:
        sft: the trainer, whose log gets the number (so W&B, TensorBoard and `log.jsonl` do).
        selection: a `datasets.Dataset` of the project's schema, of which the first `run.eval_pictures` are used; never
            `val`: what is chosen by this number must not be reported on. The processes share the pictures out.
        run: its `eval_steps`, `prompt`, `predict_batch_size`, `max_new_tokens`, and `keep`: with `best` a checkpoint is
            saved whenever the number is the best so far (the earlier of equal ones), protected from rotation;
            `BoxTrainer.load_best` takes it back at the end.

    The training goes on as if nothing had been generated: greedy decoding draws no random number, and the model returns
    to its mode. Raises ValueError where no picture has a box, because then there is no IoU.
    """

    def __init__(self, sft: BoxTrainer, selection, run: Run):
        self.sft, self.run = sft, run
        self.rows = selection.select(range(min(run.eval_pictures, len(selection))))
        self.generation = {"do_sample": False, "use_cache": True, "max_new_tokens": run.max_new_tokens}
        self.truth = data.truth_rows(self.rows)
        if not any(row["objects"]["bbox"] for row in self.truth):
            raise ValueError(f"none of the {len(self.rows)} pictures for the IoU during training has a box; take more.")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Measure where it is time, log, and ask for a checkpoint where this is the best so far."""
        if state.global_step % self.run.eval_steps and state.global_step < state.max_steps:
            return
        log_this_step, iou = control.should_log, self._measure()
        control.should_log = log_this_step  # or the step's loss would not be logged: Trainer resets it in `log`
        if self.run.keep == "best" and (state.best_metric is None or iou > state.best_metric):
            state.best_metric, state.best_global_step, control.should_save = iou, state.global_step, True

    def _measure(self) -> float:
        """Mean IoU (0-1) of the model as it is now; the same number in every process."""
        accelerator, model = self.sft.accelerator, self.sft.accelerator.unwrap_model(self.sft.model)
        mine = range(len(self.rows))[accelerator.process_index :: accelerator.num_processes]
        was_training, lines = model.training, []
        model.eval()
        try:
            for start in range(0, len(mine), self.run.predict_batch_size):
                batch = [self.rows[i] for i in mine[start : start + self.run.predict_batch_size]]
                with accelerator.autocast():
                    lines += predict.generate_lines(model, self.sft.processing_class, batch, self.run.prompt,
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
