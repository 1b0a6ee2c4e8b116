"""Measures the tiny base: on things of its own, asked for a nutrition table, and after a short fine-tuning."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy.optimize import linear_sum_assignment
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers.boxes import area, pairwise_iou, xyxy_unit_to_yxyx_unit
from helpers.messages import parse_text, target_text
from helpers.tiny.forward import forward, frame_of
from helpers.tiny.learner import answer_loss, learning_rate
from helpers.tiny.pictures import Pool, model_size, patches, take
from helpers.tiny.questions import by_name, cropped, prompt_text
from helpers.tiny.train import WHOLE, chat_ids, encode

TABLE_PROMPT = "Detect the bounding box of the nutrition table."
Item = tuple[tuple[int, int], int, str, np.ndarray]  # size of the photo, index in the pool, prompt, true boxes [N, 4]


def thing_items(pool: Pool, count: int = 600, seed: int = 0) -> list[Item]:
    """`count` questions at random about the things of a pool, in the project's own phrasing."""
    found = [
        (size, i, prompt_text(name), boxes)
        for size, scenes in pool.things.items()
        for i, scene in enumerate(scenes)
        for name, boxes in cropped(by_name(scene), WHOLE).items()
    ]
    return random.Random(seed).sample(found, min(count, len(found)))


def table_items(pool: Pool, prompt: str = TABLE_PROMPT) -> list[Item]:
    """Every scene with a nutrition panel, asked for it."""
    found = []
    for size, scenes in pool.tables.items():
        for i, scene in enumerate(scenes):
            boxes = np.array([box for _, box in scene], dtype=np.float64).reshape(-1, 4)
            boxes = boxes[area(boxes) > 0]
            if len(boxes):
                found.append((size, i, prompt, boxes))
    return found


@torch.inference_mode()
def ask(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, pool: Pool, items: Sequence[Item], *,
    batch: int = 256, max_new_tokens: int = 128,
) -> list[str]:  # fmt: skip
    """Greedy answers, special tokens kept, cut before the end token; an answer that never ends is given as it is."""
    answers, device = [""] * len(items), model.device
    for photo in sorted({item[0] for item in items}):
        size = model_size(photo, processor.image_processor.size)
        same = [k for k, item in enumerate(items) if item[0] == photo]
        for chunk in (same[i : i + batch] for i in range(0, len(same), batch)):
            prompts = [chat_ids(processor, items[k][2], size) for k in chunk]
            longest = max(map(len, prompts))
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
            pad = processor.tokenizer.pad_token_id
            ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=device)
            images = pool.images[photo][[items[k][1] for k in chunk]].to(device)
            told = model.generate(
                input_ids=ids,
                attention_mask=mask,
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=patches(take(images, WHOLE[None], size)).flatten(0, 1).to(model.dtype),
                image_grid_thw=torch.tensor([[1, size[0] // 14, size[1] // 14]] * len(chunk), device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
            for k, row in zip(chunk, told[:, longest:], strict=True):
                answers[k] = processor.tokenizer.decode(row).split("<|im_end|>")[0]
    return answers


def mean_matched_iou(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean IoU over the true boxes [N, 4], N >= 1, each with the one found box [M, 4] of an optimal matching."""
    iou = pairwise_iou(truth, found)
    return float(iou[linear_sum_assignment(-iou)].sum() / len(truth))


def score(items: Sequence[Item], answers: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Mean IoU over the questions with its bootstrap 95 % interval, share above .5, share of well-formed answers.

    Well-formed: at least one box, and nothing in the text that could not be read.
    """
    parsed = [parse_text(answer) for answer in answers]
    ious = np.array([mean_matched_iou(item[3], p.boxes_xyxy_unit) for item, p in zip(items, parsed, strict=True)])
    draws = np.random.default_rng(seed).integers(0, len(ious), (2000, len(ious)))
    low, high = np.quantile(ious[draws].mean(1), [0.025, 0.975])
    formed = [len(p.boxes_xyxy_unit) > 0 and not p.rejected for p in parsed]
    values = {
        "mean_iou": ious.mean(),
        "low": low,
        "high": high,
        "above_.5": (ious > 0.5).mean(),
        "above_.7": (ious > 0.7).mean(),
        "well_formed": np.mean(formed),
    }
    return {"n": len(ious), **{key: round(float(value), 4) for key, value in values.items()}}


def lora_probe(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, pool: Pool, *, pictures: int = 4000,
    batch: int = 8, rank: int = 16, peak: float = 1e-3, seed: int = 0, dropout: float = 0.0,
) -> torch.nn.Module:  # fmt: skip
    """Fine-tune LoRA on both towers (fp32 on the bf16 base) for nutrition panels, in a plain loop."""
    targets = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|fc1|fc2|mlp\.0|mlp\.2)"
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets)
    tuned = get_peft_model(model.to(torch.bfloat16), lora)
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=peak, weight_decay=0.0)
    rng, device, steps = random.Random(seed), model.device.type, pictures // batch
    items = table_items(pool)
    for step in range(steps):
        photo = rng.choice(items)[0]
        size = model_size(photo, processor.image_processor.size)
        drawn = rng.choices([item for item in items if item[0] == photo], k=batch)
        tables = [[t for t in pool.tables[photo][i] if area(np.array([t[1]]))[0] > 0] for _, i, _, _ in drawn]
        texts = [(TABLE_PROMPT, target_text({"bbox": xyxy_unit_to_yxyx_unit([box for _, box in t]).tolist(),
                                             "category_name": [name for name, _ in t]})) for t in tables]  # fmt: skip
        images = pool.images[photo][[i for _, i, _, _ in drawn]].to(device)
        item = {"size": size, **encode(processor, texts, size)}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, peak)
        with torch.autocast(device, torch.bfloat16):
            pixels = patches(take(images, WHOLE[None], size))
            ids, base = item["input_ids"], tuned.get_base_model()
            logits, _ = forward(base, pixels, ids.to(device), frame_of(base, size, ids[:1]))
        loss = answer_loss(logits, item["labels"].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return tuned.eval()
