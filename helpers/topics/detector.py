"""A plain detector, RT-DETR v2, on the project's rows: its labels, and its boxes in the lines of `predict`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_convert
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from helpers import evaluate
from helpers.augment import Augment
from helpers.boxes import area, xyxy_unit_to_xyxy_px, yxyx_unit_to_xyxy_unit
from helpers.settings import ParameterError

LONGER = Path(__file__).parents[2] / "notebooks" / "09_detector"  # the small one after a longer training


def _labels(names: Sequence[str]) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def small(names: Sequence[str], side: int) -> tuple[RTDetrV2ForObjectDetection, RTDetrImageProcessor]:
    """A detector of 1.4 million random weights for the classes `names`, and its image processor.

    Pictures are squeezed to `side` x `side` pixels, a multiple of 32; boxes in 0-1 do not change by it.
    """
    backbone = RTDetrResNetConfig(embedding_size=24, hidden_sizes=[24, 48, 96, 128], depths=[1, 1, 1, 1],
                                  layer_type="basic", out_features=["stage2", "stage3", "stage4"])
    config = RTDetrV2Config(
        backbone_config=backbone, freeze_backbone_batch_norms=False,  # frozen, random weights would never be normalized
        encoder_in_channels=[48, 96, 128], encoder_hidden_dim=96, encoder_ffn_dim=192, encoder_attention_heads=4,
        hidden_expansion=0.5, d_model=96, decoder_in_channels=[96] * 3, decoder_ffn_dim=192, decoder_attention_heads=4,
        decoder_layers=2, num_queries=20, num_denoising=20, initializer_range=0.1, **_labels(names),
    )
    return RTDetrV2ForObjectDetection(config), RTDetrImageProcessor(size={"height": side, "width": side})


def load(detector_id: str | Path, names: Sequence[str] | None = None):
    """A trained RT-DETR v2 of the Hub or a folder, in fp32, and its image processor.

    With `names` the head is made for these classes, and a head for others (COCO's 80) gives way to random weights.
    Raises ParameterError where there is no such model.
    """
    try:
        kind = AutoConfig.from_pretrained(detector_id).model_type
        if kind == "rt_detr_v2":
            model = RTDetrV2ForObjectDetection.from_pretrained(
                detector_id, use_safetensors=True, dtype=torch.float32,
                **({"ignore_mismatched_sizes": True, **_labels(names)} if names else {}))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return model.to(device), AutoImageProcessor.from_pretrained(detector_id)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ParameterError(f"detector_id={str(detector_id)!r} cannot be loaded: {why}") from error
    raise ParameterError(f"detector_id={str(detector_id)!r} is a {kind}; expected an RT-DETR v2.")


class Collator:
    """Rows -> `{"pixel_values" [B, 3, H, W], "labels"}`; labels are B x `{"class_labels" [N], "boxes" [N, 4]}`.

    RT-DETR learns boxes as [center x, center y, width, height] in 0-1; its image processor makes them from COCO's. With
    a single name in `names`, every box is of that class. `augment` changes the rows first.
    """

    def __init__(self, image_processor, names: Sequence[str], augment: Augment | None = None):
        self.image_processor, self.names, self.augment = image_processor, list(names), augment

    def __call__(self, rows: Sequence[Mapping]) -> dict:
        rows = [self.augment(row) for row in rows] if self.augment else rows
        images = [row["image"].convert("RGB") for row in rows]
        annotations = [self.annotation(row["objects"], image.size) for row, image in zip(rows, images, strict=True)]
        batch = self.image_processor(images, annotations=annotations, return_tensors="pt")
        labels = [{name: label[name] for name in ("class_labels", "boxes")} for label in batch["labels"]]
        return {"pixel_values": batch["pixel_values"], "labels": labels}

    def annotation(self, objects: Mapping, size: tuple[int, int]) -> dict:
        """A row's `objects` in COCO's form, for a picture of `size` (width, height)."""
        corners = xyxy_unit_to_xyxy_px(yxyx_unit_to_xyxy_unit(objects["bbox"]), *size)
        boxes = box_convert(torch.from_numpy(corners), "xyxy", "xywh")
        kinds = [self.names.index(name) if len(self.names) > 1 else 0 for name in objects["category_name"]]
        return {"image_id": 0, "annotations": [
            {"bbox": box, "category_id": kind, "area": box[2] * box[3], "iscrowd": 0}
            for box, kind in zip(boxes.tolist(), kinds, strict=True)]}  # fmt: skip


@torch.inference_mode()
def predict(model, image_processor, rows) -> list[dict]:
    """The boxes of every row's picture as lines of predictions.jsonl, all those of a confidence of at least .01."""
    model.eval()
    lines = []
    for start in range(0, len(rows), 32):
        few = [rows[i] for i in range(start, min(start + 32, len(rows)))]
        pixels = image_processor([row["image"].convert("RGB") for row in few], return_tensors="pt")["pixel_values"]
        found = image_processor.post_process_object_detection(model(pixels.to(model.device)), threshold=0.01)
        lines += [line(row["image_id"], one, model.config.id2label) for row, one in zip(few, found, strict=True)]
    return lines


def line(image_id: str, found: Mapping, names: Mapping[int, str]) -> dict:
    """One picture's `{"scores", "labels", "boxes"}` (tensors; boxes x first, 0-1) as a line of predictions.jsonl."""
    boxes = found["boxes"].cpu().double().clamp(0, 1).numpy()
    kept = np.flatnonzero(area(boxes) > 0)
    return {"image_id": image_id, "text": "", "labels": [names[int(found["labels"][i])] for i in kept],
            "boxes": boxes[kept].round(4).tolist(), "confidences": [round(float(found["scores"][i]), 4) for i in kept],
            "rejected": [], "stopped": True, "new_tokens": 0}


def best_threshold(truth: list[dict], predictions: list[dict]) -> float:
    """The confidence (of .05, .10, … .95) whose kept boxes have the best F1 at IoU .5."""
    def f1(threshold: float) -> float:
        kept = evaluate.keep_confident(predictions, threshold)
        return evaluate.score(truth, kept, resamples=0)["summary"]["f1"]["value"] or 0.0

    return max(np.arange(1, 20).tolist(), key=lambda n: (f1(n / 20), n)) / 20
