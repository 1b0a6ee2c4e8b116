# %% [markdown]
# # From a row to a batch: what happens to a photo and its box before training?
#
# There are only a handful of steps between a photo with a box and the loss, but a mistake in any of them is hard to
# find: a resize that moves the box, a token that is not trained, a length limit that cuts the picture. This notebook
# takes the steps one by one and measures each:
#
# row → messages → tokens → **labels**, and beside it photo → resize → patches → **image tokens**; then what
# `max_length` cuts, augmentation with boxes, and what padding wastes.
#
# By default it uses the embedded scenes and the tiny model's processor. That is the real model's class with the same
# chat template and special tokens, only the vocabulary is smaller. So the numbers for the 7B pixel budget below are
# measured too.

# %% tags=["parameters"]
scale = "tiny"  # tiny or 7b: whose processor, data set and pixel budget
model_id = None  # Hub id or local folder, or embedded; only its processor is loaded
dataset_id = None  # Hub id, local folder or file, or embedded
prompt = "Detect the bounding box of the nutrition table."
min_pixels = None  # pixel budget of a picture; None: that of the scale
max_pixels = None
val_limit = None  # use only the first so many pictures
seed = 0

# %%
from helpers.topics.opening import opening

opening(globals(), "model_id", "dataset_id", "prompt", "min_pixels", "max_pixels", "val_limit", "seed",
        scale=("tiny", "7b"))

import math
import re

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from PIL import Image
from torchvision import ops, tv_tensors
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers import augment, boxes, collate, data, messages, model, plots
from helpers.recipes import SCALES
from helpers.settings import TINY_BASE

# %% [markdown]
# ## Row → messages
#
# A vision-language model writes text, so the box becomes text: Qwen2-VL's own grounding format, in whole
# thousandths of the picture's width and height, x first, boxes in reading order. Prompt and completion are kept apart,
# so that the loss can be computed on the completion alone.

# %%
limit = {"train": 1} | ({"val": val_limit} if val_limit else {})
rows = data.load_splits(dataset_id, seed=seed, limit=limit)["val"]
with_box = rows.filter(lambda objects: len(objects["bbox"]) > 0, input_columns="objects")
row = with_box[0]
edges = ["y_min", "x_min", "y_max", "x_max"]
display(pd.DataFrame(row["objects"]["bbox"], columns=edges).round(4), chat := messages.to_messages(row, prompt))

# %% [markdown]
# What does rounding to thousandths cost? We parse the text of every box and compare the result with the truth. No model
# that writes thousandths can score noticeably more than this.

# %%
kept = []
for objects in with_box["objects"]:
    true = boxes.yxyx_unit_to_xyxy_unit(objects["bbox"])
    parsed = messages.parse_text(messages.target_text(objects)).boxes_xyxy_unit
    kept += boxes.pairwise_iou(true, parsed).max(axis=1).tolist()
print(f"{len(kept)} boxes keep an IoU of {np.mean(kept):.4f} on average, {min(kept):.3f} at the least.")

# %% [markdown]
# ## Messages → tokens
#
# The chat template adds a system message, the markers of the turns and one `<|image_pad|>`, which the processor repeats
# for every image token. A special token is one token, and so is each digit.

# %%
processor = Qwen2VLProcessor.from_pretrained(TINY_BASE if model_id == "embedded" else model_id,
                                             min_pixels=min_pixels, max_pixels=max_pixels)
collator = collate.Collator(processor, prompt)
print(collator.texts([row])[0])
print(processor.tokenizer.tokenize(chat["completion"][0]["content"][0]["text"]))

# %% [markdown]
# ## Photo → image tokens
#
# The model takes patches of 14 × 14 pixels and merges 2 × 2 of them into one token, so both sides must be multiples of
# 28. *Smart resize* rounds them, and keeps the area within a budget: with $s = \sqrt{\mathrm{max} / (h w)}$ a photo
# that is too large gets sides $28 \lfloor s h / 28 \rfloor$ and $28 \lfloor s w / 28 \rfloor$; one that is too small
# is scaled up likewise and rounded up. Here it is by hand (height, width), beside the library's function, with the
# budgets of this project's two scales and with the one that Qwen published.

# %%
def by_hand(height, width, low, high):
    """Height and width in pixels after smart resize."""
    tall, wide = round(height / 28) * 28, round(width / 28) * 28
    if tall * wide > high:
        s = math.sqrt(high / (height * width))
        tall, wide = (max(28, math.floor(s * side / 28) * 28) for side in (height, width))
    elif tall * wide < low:
        s = math.sqrt(low / (height * width))
        tall, wide = (math.ceil(s * side / 28) * 28 for side in (height, width))
    return tall, wide


budgets = {name: (at["min_pixels"], at["max_pixels"]) for name, at in SCALES.items()}
budgets["7b as published"] = 4 * 784, 16384 * 784
sizes = pd.DataFrame([{"photo": f"{width} × {height}", "budget": name, "by hand": by_hand(height, width, *budget),
                       "smart_resize": smart_resize(height, width, 28, *budget)}
                      for width, height in ((3024, 4032), (600, 800), (120, 90), (3000, 240))
                      for name, budget in budgets.items()])  # fmt: skip
sizes["image tokens"] = sizes["by hand"].map(math.prod) // 784
display(sizes)
print(f"By hand and library agree in {(sizes['by hand'] == sizes['smart_resize']).sum()} of {len(sizes)} lines.")

# %% [markdown]
# A box in shares of width and height stretches with the picture and stays right; a box in pixels would not. This
# project trains 7B with 256 to 1280 image tokens. Training and use must have the same budget, or the model meets tables
# of a size that it has not learned. So the processor is saved with every model.
#
# What is left of a table? Here is one at both budgets, cut out of the resized photo.

# %%
true, views = boxes.yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]), []
for name in ("7b", "tiny"):
    height, width = by_hand(row["height"], row["width"], *budgets[name])
    small = row["image"].convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    across, down = (true[0, 2:] - true[0, :2]) * [width, height] / 28
    table = small.crop(tuple(true[0] * [width, height, width, height]))
    views.append((f"{name}, photo {width} × {height} px\ntable {across:.1f} × {down:.1f} tokens", table, [], []))
plots.panels(views, columns=2, names=("", ""))

# %% [markdown]
# ## Tokens → labels
#
# A label is the token that should come next, or -100 where no loss is computed. There are two scopes: `assistant` is
# the completion and the `<|im_end|>` that teaches the model to stop; `all-text` adds system message and prompt. Vision
# tokens and padding are masked in both. Blue and underlined tokens are trained on, grey ones are masked. What the
# choice brings is measured in `10_better_boxes`.

# %%
labels = {scope: collate.Collator(processor, prompt, scope)([row]) for scope in ("assistant", "all-text")}
for scope, batch in labels.items():
    display(plots.label_mask(processor.tokenizer, batch["input_ids"][0], batch["labels"][0], title=scope))

# %%
for scope, batch in labels.items():
    trained = [processor.tokenizer.decode([token]) for token in batch["labels"][0] if token != collate.IGNORED]
    print(f"{scope}: {sum(map(str.isdigit, trained))} of {len(trained)} trained tokens are digits of coordinates")
frames = pd.Series([re.sub(r"\d+", "#", messages.target_text(objects)) for objects in with_box["objects"]])
print(f"Without digits {frames.value_counts(normalize=True).max():.0%} of the completions are one and the same text")

# %% [markdown]
# So much of the loss is on text that hardly varies. A small loss does not prove good boxes; a high IoU does.
#
# ## What `max_length` cuts
#
# TRL cuts sequences at `max_length`, by default 1024, and a photo at the 7B budget makes up to 1280 image tokens. What
# happens then? We let TRL's own collator cut, and give the batch to the tiny model.

# %%
tiny = model.load(TINY_BASE).eval()


def outcome(photo, budget, max_length):
    """What TRL's collator leaves of a row, and what the model says to it."""
    least, most = budgets[budget]
    cut_to = DataCollatorForVisionLanguageModeling(
        Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=least, max_pixels=most), max_length=max_length,
        completion_only_loss=True)  # fmt: skip
    batch = cut_to([messages.to_messages(photo, prompt)])
    trained = (batch["labels"] != collate.IGNORED).sum().item()
    try:
        result = f"loss {tiny(**batch).loss.item():.2f}"
    except ValueError as error:
        result = f"ValueError: {error}"
    return {"max_length": str(max_length), "tokens": batch["input_ids"].shape[1], "trained": trained, "model": result}


phone = row | {"image": row["image"].resize((3024, 4032))}
whole = outcome(row, "tiny", None)
display(pd.DataFrame([outcome(phone, "7b", 1024), whole] + [
    outcome(row, "tiny", whole["tokens"] - cut) for cut in (2, 12, whole["trained"])]).style.hide())

# %% [markdown]
# A cut through the picture raises an error. A cut *after* it does not: the first tokens to go are the end of the
# completion, so the model never learns to stop and repeats boxes up to the token limit. With no completion left, the
# loss is not a number. So this project sets `max_length=None`, and its collator refuses a row that is too long, by
# name.
#
# ## Augmentation with boxes
#
# Another view of a picture is another training picture, if its box moves with it. The parameter `augment` makes one in
# each epoch. It never mirrors, because mirrored text is not text. What happens depends on seed, epoch and picture
# alone, so a run that was killed and goes on makes the same views.

# %%
changed, views = augment.Augment(seed), [("as it is", row["image"], true, [])]
for changed.epoch in range(5):
    view = changed(row)
    views.append((f"epoch {changed.epoch}", view["image"], boxes.yxyx_unit_to_xyxy_unit(view["objects"]["bbox"]), []))
plots.panels(views, columns=6)

# %% [markdown]
# Does the box stay right? We send white boxes on black ground through the same geometry, and compare the outline of the
# white area with the box that comes out.

# %%
off = []
for objects in with_box[:60]["objects"]:
    y0, x0, y1, x1 = (np.array(objects["bbox"][0]) * [384, 288, 384, 288]).round().astype(int)
    white = torch.zeros(3, 384, 288, dtype=torch.uint8)
    white[:, y0:y1, x0:x1] = 255
    view, moved = augment.warp(tv_tensors.Image(white), [[y0 / 384, x0 / 288, y1 / 384, x1 / 288]])
    outline = ops.masks_to_boxes(view[:1].as_subclass(torch.Tensor) > 180).numpy() + [0, 0, 1, 1]
    off.append(np.abs(moved - outline).max())
print(f"Box and outline of {len(off)} boxes differ by {np.median(off):.1f} px (median) and {max(off):.1f} px (most).")

# %% [markdown]
# ## Padding
#
# A batch is a rectangle: short sequences are padded to the length of the longest, and the language model computes on
# the padding too. How much is wasted with photos from many phones and cameras? Assume that half of them come straight
# from a phone, and that the rest are smaller uploads and crops. `grouped` is transformers' `group_by_length`.

# %%
kinds = [(3024, 4032), (2268, 4032), (1200, 1600), (1080, 1920), (600, 800), (700, 250)]
photos = np.random.default_rng(seed).choice(kinds, 1000, p=[0.35, 0.15, 0.2, 0.1, 0.1, 0.1])
for name in ("7b", "7b as published"):
    lengths = np.array([math.prod(by_hand(height, width, *budgets[name])) // 784 + 60 for width, height in photos])
    for size in (2, 8):
        grouped = get_length_grouped_indices(lengths.tolist(), size, generator=torch.Generator().manual_seed(seed))
        for way, order in (("shuffled", np.arange(1000)), ("grouped", grouped)):
            longest = lengths[order].reshape(-1, size).max(axis=1).sum() * size
            print(f"{name}, batches of {size}, {way}: {1 - lengths.sum() / longest:.1%} padding")

# %% [markdown]
# The bound on pixels does much of the work, because large photos all end near the same length. Grouping by length does
# most of the rest, but the pictures of a batch then resemble each other.
#
# Next: [02_model_understanding](02_model_understanding.ipynb), on what the model makes of these tokens.
