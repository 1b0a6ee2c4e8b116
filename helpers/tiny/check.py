"""Measures the tiny base on prompts about the things it was trained on, and about nutrition tables."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers import evaluate
from helpers.boxes import area, xyxy_unit_to_yxyx_unit
from helpers.messages import END_OF_TURN
from helpers.tiny.pictures import Pool, Size
from helpers.tiny.prompts import WHOLE, by_name, cropped, prompt_text

Prompt = tuple[Size, int, str, np.ndarray]  # size of the photo, index in the pool, prompt, true boxes [N, 4]


def thing_prompts(pool: Pool, count: int) -> list[Prompt]:
    """`count` prompts at random about the things of a pool, in the project's own phrasing."""
    scenes = [(size, i, scene) for size, scenes in pool.things.items() for i, scene in enumerate(scenes)]
    found = [(size, i, prompt_text(name), boxes)
             for size, i, scene in scenes for name, boxes in cropped(by_name(scene), WHOLE).items()]  # fmt: skip
    return random.Random(0).sample(found, min(count, len(found)))


def table_prompts(pool: Pool) -> list[Prompt]:
    """One prompt for every scene with a nutrition panel."""
    found = []
    for size, scenes in pool.tables.items():
        for i, tables in enumerate(scenes):
            boxes = np.array([box for _, box in tables if area([box])[0] > 0])
            found += [(size, i, prompt_text("nutrition table"), boxes)] if len(boxes) else []
    return found


@torch.inference_mode()
def generate(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, pool: Pool, prompts: Sequence[Prompt]
) -> list[str]:
    """Greedy completions of at most 128 tokens, special tokens kept, cut before the end token."""
    texts: list[str] = []
    for some in (prompts[i : i + 16] for i in range(0, len(prompts), 16)):
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
                 for _, _, prompt, _ in some]  # fmt: skip
        inputs = processor(
            text=processor.apply_chat_template(chats, add_generation_prompt=True),
            images=[pool.images[size][i] for size, i, _, _ in some],
            padding=True, padding_side="left", return_tensors="pt",
        ).to(model.device)  # fmt: skip
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=128)[:, inputs["input_ids"].shape[1] :]
        texts += [text.split(END_OF_TURN)[0] for text in processor.tokenizer.batch_decode(tokens)]
    return texts


def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> dict[str, float]:
    """Mean IoU over the prompts with its 95 % interval, shares above .5 and .7, share of well-formed completions."""
    truth = [{"image_id": str(k), "objects": {"bbox": xyxy_unit_to_yxyx_unit(boxes).tolist(),
                                              "category_name": [""] * len(boxes)}}
             for k, (_, _, _, boxes) in enumerate(prompts)]  # fmt: skip
    found = [{"image_id": str(k), "text": text} for k, text in enumerate(completions)]
    summary = evaluate.score(truth, found)["summary"]
    iou, unread = summary["mean_iou"], summary["format_error_rate"]["value"]
    values = {"mean_iou": iou["value"], "low": iou["low"], "high": iou["high"], "well_formed": 1 - unread,
              "above_.5": summary["iou_over_50"]["value"], "above_.7": summary["iou_over_70"]["value"]}
    return {"n": len(prompts), **{name: round(value, 4) for name, value in values.items()}}
