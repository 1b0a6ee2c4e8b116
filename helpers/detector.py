"""A plain detector, RT-DETR v2, on the project's rows: labels, training, and predictions as `predict` writes them."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
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
from helpers.boxes import area, clip_unit, xyxy_px_to_xywh_px, xyxy_unit_to_xyxy_px, yxyx_unit_to_xyxy_unit
from helpers.parameters import ParameterError
from helpers.progress import progress_bar


def small(names: Sequence[str], side: int = 224, **changes) -> tuple[RTDetrV2ForObjectDetection, RTDetrImageProcessor]:
    """A detector of about a million random weights for the classes `names`, and its image processor.

    Pictures are squeezed to `side` x `side` pixels, a multiple of 32; boxes in 0-1 do not change by it.
    """
    backbone = RTDetrResNetConfig(embedding_size=24, hidden_sizes=[24, 48, 96, 160], depths=[1, 1, 1, 1],
                                  layer_type="basic", out_features=["stage2", "stage3", "stage4"])
    config = RTDetrV2Config(
        backbone_config=backbone, freeze_backbone_batch_norms=False,  # frozen, random weights would never be normalised
        encoder_in_channels=[48, 96, 160], encoder_hidden_dim=96, encoder_ffn_dim=192, encoder_attention_heads=4,
        hidden_expansion=0.5, d_model=96, decoder_in_channels=[96] * 3, decoder_ffn_dim=192, decoder_attention_heads=4,
        **(dict(decoder_layers=2, num_queries=20, num_denoising=20) | changes | _labels(names)),
    )
    processor = RTDetrImageProcessor(size={"height": side, "width": side})
    return RTDetrV2ForObjectDetection(config), processor


def _labels(names: Sequence[str]) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def load(model_id: str, names: Sequence[str], revision: str | None = None):
    """A detector of the Hub or a folder with its backbone, a new head for `names`, and its image processor."""
    try:
        model = RTDetrV2ForObjectDetection.from_pretrained(
            model_id, revision=revision, use_safetensors=True, ignore_mismatched_sizes=True, **_labels(names))
        return model, AutoImageProcessor.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError) as error:
        raise ParameterError(f"{model_id!r}: {error}") from error


class Collator:
    """Rows -> `{"pixel_values" [B, 3, H, W], "labels"}`; labels are B x `{"class_labels" [N], "boxes" [N, 4]}`.

    The boxes that RT-DETR learns are [centre x, centre y, width, height] in 0-1: the image processor makes them, from
    COCO's. With a single name, every box is of that class. `augment`: a row -> a changed row.
    """

    def __init__(self, image_processor, names: Sequence[str], augment=None):
        self.image_processor, self.names, self.augment = image_processor, list(names), augment

    def __call__(self, rows: Sequence[Mapping]) -> dict:
        rows = [self.augment(row) for row in rows] if self.augment else rows
        images = [row["image"].convert("RGB") for row in rows]
        annotations = [self.coco(i, row["objects"], image.size) for i, (row, image) in enumerate(zip(rows, images, strict=True))]
        batch = self.image_processor(images, annotations=annotations, return_tensors="pt")
        labels = [{name: label[name] for name in ("class_labels", "boxes")} for label in batch["labels"]]
        return {"pixel_values": batch["pixel_values"], "labels": labels}

    def coco(self, number: int, objects: Mapping, size: tuple[int, int]) -> dict:
        """A row's `objects` as a COCO annotation of a picture of `size` (width, height)."""
        boxes = xyxy_px_to_xywh_px(xyxy_unit_to_xyxy_px(yxyx_unit_to_xyxy_unit(objects["bbox"]), *size))
        kinds = [self.names.index(name) if len(self.names) > 1 else 0 for name in objects["category_name"]]
        return {"image_id": number, "annotations": [
            {"bbox": box, "category_id": kind, "area": box[2] * box[3], "iscrowd": 0}
            for box, kind in zip(boxes.tolist(), kinds, strict=True)]}  # fmt: skip


def train(model, collator: Collator, rows, folder: Path, *, epochs: float, batch_size: int, learning_rate: float,
          seed: int = 0, **more) -> list[dict]:
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=batch_size,
        learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=1e-4,
        max_grad_norm=0.1, remove_unused_columns=False, logging_steps=1, report_to="none",
        dataloader_num_workers=4 if torch.cuda.is_available() else 0, use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True, seed=seed, **({"save_strategy": "no"} | more),
    )
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows)
    for own in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(own)
    if collator.augment is not None:
        trainer.add_callback(collator.augment)
    trainer.train()
    return trainer.state.log_history


@torch.inference_mode()
def predict(model, image_processor, rows, batch_size: int = 32, least: float = 0.01) -> list[dict]:
    model.eval()
    lines = []
    for start in range(0, len(rows), batch_size):
        few = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        pixels = image_processor([row["image"].convert("RGB") for row in few], return_tensors="pt")["pixel_values"]
        found = image_processor.post_process_object_detection(model(pixels.to(model.device)), threshold=least)
        lines += [line(row["image_id"], one, model.config.id2label) for row, one in zip(few, found, strict=True)]
    return lines


def line(image_id: str, found: Mapping, names: Mapping[int, str]) -> dict:
    boxes = clip_unit(found["boxes"].cpu().double().numpy())
    kept = np.flatnonzero(area(boxes) > 0)
    return {"image_id": image_id, "text": "", "labels": [names[int(found["labels"][i])] for i in kept],
            "boxes": boxes[kept].round(4).tolist(), "confidences": [round(float(found["scores"][i]), 4) for i in kept],
            "rejected": [], "stopped": True, "new_tokens": 0}
