"""A plain detector, RT-DETR v2, on the project's rows: its labels, its training, its boxes in `predict`'s lines."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    PrinterCallback,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from helpers import evaluate
from helpers.augment import Augment
from helpers.boxes import area, clip_unit, xyxy_px_to_xywh_px, xyxy_unit_to_xyxy_px, yxyx_unit_to_xyxy_unit
from helpers.data.pictures import as_rgb
from helpers.files import write_json
from helpers.parameters import ParameterError

LONGER = Path(__file__).parents[1] / "notebooks" / "09_detector"  # the small one after a longer training


def small(names: Sequence[str], side: int = 160) -> tuple[RTDetrV2ForObjectDetection, RTDetrImageProcessor]:
    """A detector of 1.4 million random weights for the classes `names`, and its image processor.

    Pictures are squeezed to `side` x `side` pixels, a multiple of 32; boxes in 0-1 do not change by it.
    """
    backbone = RTDetrResNetConfig(embedding_size=24, hidden_sizes=[24, 48, 96, 128], depths=[1, 1, 1, 1],
                                  layer_type="basic", out_features=["stage2", "stage3", "stage4"])
    config = RTDetrV2Config(
        backbone_config=backbone, freeze_backbone_batch_norms=False,  # frozen, random weights would never be normalised
        encoder_in_channels=[48, 96, 128], encoder_hidden_dim=96, encoder_ffn_dim=192, encoder_attention_heads=4,
        hidden_expansion=0.5, d_model=96, decoder_in_channels=[96] * 3, decoder_ffn_dim=192, decoder_attention_heads=4,
        decoder_layers=2, num_queries=20, num_denoising=20, initializer_range=0.1, **_labels(names),
    )
    processor = RTDetrImageProcessor(size={"height": side, "width": side})
    return RTDetrV2ForObjectDetection(config), processor


def _labels(names: Sequence[str]) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def load(model_id: str, names: Sequence[str] | None = None, revision: str | None = None):
    """A trained RT-DETR v2 of the Hub or a folder, in fp32, and its image processor.

    With `names` the head is made for these classes, and a head for others (COCO's 80) gives way to random weights.
    Raises ParameterError where there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(model_id, revision=revision)
        if config.model_type != "rt_detr_v2":
            raise ParameterError(f"model_id={model_id!r} is a {config.model_type}; expected an RT-DETR v2, such as "
                                 "PekingU/rtdetr_v2_r18vd.")
        model = RTDetrV2ForObjectDetection.from_pretrained(
            model_id, revision=revision, use_safetensors=True, dtype=torch.float32,
            **({"ignore_mismatched_sizes": True, **_labels(names)} if names else {}))
        processor = AutoImageProcessor.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(f"model_id={model_id!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


class Collator:
    """Rows -> `{"pixel_values" [B, 3, H, W], "labels"}`; labels are B x `{"class_labels" [N], "boxes" [N, 4]}`.

    RT-DETR learns boxes as [centre x, centre y, width, height] in 0-1; its image processor makes them from COCO's. With
    a single name in `names`, every box is of that class. `augment` changes the rows first.
    """

    def __init__(self, image_processor, names: Sequence[str], augment: Augment | None = None):
        self.image_processor, self.names, self.augment = image_processor, list(names), augment

    def __call__(self, rows: Sequence[Mapping]) -> dict:
        rows = [self.augment(row) for row in rows] if self.augment else rows
        images = [as_rgb(row["image"]) for row in rows]
        annotations = [self.annotation(row["objects"], image.size) for row, image in zip(rows, images, strict=True)]
        batch = self.image_processor(images, annotations=annotations, return_tensors="pt")
        labels = [{name: label[name] for name in ("class_labels", "boxes")} for label in batch["labels"]]
        return {"pixel_values": batch["pixel_values"], "labels": labels}

    def annotation(self, objects: Mapping, size: tuple[int, int]) -> dict:
        """A row's `objects` in COCO's form, for a picture of `size` (width, height)."""
        boxes = xyxy_px_to_xywh_px(xyxy_unit_to_xyxy_px(yxyx_unit_to_xyxy_unit(objects["bbox"]), *size))
        kinds = [self.names.index(name) if len(self.names) > 1 else 0 for name in objects["category_name"]]
        return {"image_id": 0, "annotations": [
            {"bbox": box, "category_id": kind, "area": box[2] * box[3], "iscrowd": 0}
            for box, kind in zip(boxes.tolist(), kinds, strict=True)]}  # fmt: skip


def train(model, arguments: TrainingArguments, collator: Collator, rows) -> dict:
    """Train with transformers' Trainer, in place; `{"log", "seconds", "cpu_seconds" of this process, "pictures"}`."""
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows)
    for own in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(own)
    if collator.augment is not None:
        trainer.add_callback(collator.augment)  # tells it the epoch
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    return {"log": trainer.state.log_history, "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu, "pictures": len(rows)}


@torch.inference_mode()
def predict(model, image_processor, rows, batch_size: int = 32, least: float = 0.01) -> list[dict]:
    """The boxes of every row's picture as lines of predictions.jsonl, all those of a confidence of at least `least`."""
    model.eval()
    lines = []
    for start in range(0, len(rows), batch_size):
        few = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        pixels = image_processor([as_rgb(row["image"]) for row in few], return_tensors="pt")["pixel_values"]
        found = image_processor.post_process_object_detection(model(pixels.to(model.device)), threshold=least)
        lines += [line(row["image_id"], one, model.config.id2label) for row, one in zip(few, found, strict=True)]
    return lines


def line(image_id: str, found: Mapping, names: Mapping[int, str]) -> dict:
    """One picture's `{"scores", "labels", "boxes"}` (tensors; boxes x first, 0-1) as a line of predictions.jsonl.

    There is no text, so nothing of it can be rejected or left unfinished.
    """
    boxes = clip_unit(found["boxes"].cpu().double().numpy())
    kept = np.flatnonzero(area(boxes) > 0)
    return {"image_id": image_id, "text": "", "labels": [names[int(found["labels"][i])] for i in kept],
            "boxes": boxes[kept].round(4).tolist(), "confidences": [round(float(found["scores"][i]), 4) for i in kept],
            "rejected": [], "stopped": True, "new_tokens": 0}


def best_threshold(truth: list[dict], predictions: list[dict]) -> tuple[float, float]:
    """The confidence (of .05, .10, … .95) whose kept boxes have the best F1 at IoU .5, and that F1.

    A detector gives a box for every query, most of them of no worth; which to believe is chosen on `selection`.
    """
    scores = {}
    for threshold in np.arange(1, 20) / 20:
        kept = evaluate.keep_confident(predictions, threshold)
        scores[float(threshold)] = evaluate.score(truth, kept, resamples=0)["summary"]["f1"]["value"] or 0.0
    best = max(scores, key=lambda threshold: (scores[threshold], threshold))
    return best, scores[best]


def save(model, image_processor, folder: Path, record: Mapping) -> None:
    """The detector in fp16 (half the size), its processor and `record` as trained.json, in a folder for `load`."""
    weights = model.state_dict().items()
    kept = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights}
    model.save_pretrained(folder, state_dict=kept)
    image_processor.save_pretrained(folder)
    write_json(Path(folder) / "trained.json", dict(record))


def seconds(calls: Mapping[str, Callable[[], object]], repeats: int = 3) -> dict[str, float]:
    """The shortest of `repeats` times of each call, in turns, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: min(taken) for name, taken in times.items()}


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Memory that `call` takes at its peak beyond what is held before: of the GPU, or of this process on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free already would hide the peak
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
