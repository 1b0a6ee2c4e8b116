# %% [markdown]
# # From a row to a batch
#
# Between a photo with a box and a number that training can push down lie a handful of steps, and each has cost somebody
# days: a resize that moves the box, a token that is not trained, a length limit that cuts the picture. This notebook
# walks the way once and measures at each step.
#
# row → messages → text → tokens → **labels**, and beside them photo → resize → patches → **image tokens**; then what
# `max_length` cuts, augmentation with boxes, and what padding wastes.
#
# By default it runs on the embedded scenes and the tiny model's processor. That is the real model's class with the same
# chat template and special tokens; only the vocabulary is smaller. So the numbers for the 7B pixel budget below are
# measured too.

# %% tags=["parameters"]
scale = "tiny"  # tiny or 7b: whose processor, data set and pixel budget
model_id = None  # Hub id or local folder, or embedded; only its processor is loaded
model_revision = None  # commit, branch or tag on the Hub
dataset_id = None  # Hub id, local folder or file, or embedded
dataset_revision = None
prompt = "Detect the bounding box of the nutrition table."
min_pixels = None  # pixel budget of a picture
max_pixels = None
val_limit = None  # use only the first so many pictures
seed = 0

# %%
from helpers import parameters, recipes, settings

names = ("model_id", "model_revision", "dataset_id", "dataset_revision", "prompt", "min_pixels", "max_pixels",
         "val_limit", "seed")  # fmt: skip
known = {name: parameters.PARAMETERS[name] for name in names} | {"scale": parameters.one_of(*recipes.SCALES)}
parameters.given(globals(), known)
values = {name: globals()[name] for name in known}
parameters.check(values, known)
values |= {name: value for name, value in recipes.SCALES[scale].items() if name in known and values[name] is None}
parameters.check(values, known)
model_path = settings.TINY_BASE if values["model_id"] == "embedded" else values["model_id"]
low, high = values["min_pixels"], values["max_pixels"]

# %%
from helpers import runs

runs.quiet_libraries()
import math
import re

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from PIL import Image
from torchvision import ops, tv_tensors
from torchvision.transforms import v2
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers import augment, boxes, collate, data, messages, model, plots
from helpers.budget import image_tokens, padding_share
from helpers.data.tables import box_table

# %% [markdown]
# ## Row → messages
#
# A vision-language model answers in text, so the box becomes text: Qwen2-VL's own grounding format, in whole
# thousandths of the picture's width and height, x first. Prompt and answer stand apart, so that the loss can look at
# the answer alone.
#
# What does rounding to thousandths cost? The text of every box is parsed back and held against the truth. Half a
# thousandth is the most that a coordinate may move.

# %%
raw = data.load_raw(values["dataset_id"], revision=dataset_revision, seed=seed,
                    limit={"train": 1} | ({"val": val_limit} if val_limit else {}))
rows = data.clean(raw, data.audit(raw))["val"]
tables = box_table({"val": data.truth_rows(rows)})
if tables.empty:
    raise data.DataError(f"val_limit={val_limit} leaves {len(rows)} pictures of val, none with a box; take more.")
middling = (tables[["x0", "y0", "x1", "y1"]] - [0.3, 0.35, 0.7, 0.65]).abs().sum(axis=1)
row = next(row for row in rows if row["image_id"] == tables.loc[middling.idxmin(), "image_id"])
chat = messages.to_messages(row, prompt)
display({"bbox, y first": row["objects"]["bbox"]}, chat["prompt"], chat["completion"])

# %%
there = [boxes.yxyx_unit_to_xyxy_unit(objects["bbox"]) for objects in rows["objects"]]
back = [messages.parse_text(messages.target_text(objects)).boxes_xyxy_unit for objects in rows["objects"]]
there = [box[boxes.reading_order(box)] for box in there]
moved = max(np.abs(a - b).max() for a, b in zip(there, back, strict=True) if len(a))
kept = np.concatenate([np.diag(boxes.pairwise_iou(a, b)) for a, b in zip(there, back, strict=True)])
Markdown(f"""{len(kept)} boxes come back, moved by {moved * 1000:.2f} thousandths at most (expected: .5). The IoU of
box and rounded box is {kept.mean():.4f} on average and **{kept.min():.3f}** at the least. No model that writes
thousandths can score more; on the smallest table this is the ceiling.""")

# %% [markdown]
# ## Messages → text → tokens
#
# The chat template adds a system message, the turns' markers and one `<|image_pad|>`; the processor repeats that one
# for every image token. A special token is one token, and so is each digit; a word that the vocabulary lacks falls
# into pieces.

# %%
processor = Qwen2VLProcessor.from_pretrained(model_path, revision=model_revision, min_pixels=low, max_pixels=high)
collator = collate.Collator(processor, prompt)
print(collator.texts([row])[0])
print(processor.tokenizer.tokenize(chat["completion"][0]["content"][0]["text"]))

# %% [markdown]
# ## Photo → image tokens
#
# The model takes patches of 14 × 14 pixels and merges 2 × 2 of them into one token, so both sides must be multiples of
# 28. *Smart resize* rounds them, and keeps the area within a budget: with $s = \sqrt{\mathrm{max} / (h w)}$ a photo
# that is too large gets sides $28 \lfloor s h / 28 \rfloor$ and $28 \lfloor s w / 28 \rfloor$; one that is too small
# is scaled up likewise and rounded up. Written down by hand, beside the library's function and what the processor does
# (width x height):

# %%
def by_hand(height, width, low, high, unit=28):
    """Height and width in pixels after smart resize."""
    rounded = round(height / unit) * unit, round(width / unit) * unit
    if math.prod(rounded) > high:
        s = math.sqrt(high / (height * width))
        return tuple(max(unit, math.floor(s * side / unit) * unit) for side in (height, width))
    if math.prod(rounded) < low:
        s = math.sqrt(low / (height * width))
        return tuple(math.ceil(s * side / unit) * unit for side in (height, width))
    return rounded


# %%
budgets = {name: (at["min_pixels"], at["max_pixels"]) for name, at in recipes.SCALES.items()}
lines = []
for width, height in ((3024, 4032), (1080, 1920), (600, 800), (384, 512), (120, 90), (3000, 240)):
    for name, (least, most) in budgets.items():
        made = processor.image_processor(Image.new("RGB", (width, height)), min_pixels=least, max_pixels=most)
        _, tall, wide = made["image_grid_thw"][0].tolist()  # in patches
        lines.append({"photo": f"{width} x {height}", "budget": name,
                      "by hand": by_hand(height, width, least, most)[::-1],
                      "smart_resize": smart_resize(height, width, 28, least, most)[::-1],
                      "processor": (14 * wide, 14 * tall), "image tokens": tall * wide // 4,
                      "scale": 14 * wide / width, "stretched, %": 100 * abs(wide / tall * height / width - 1)})
resized = pd.DataFrame(lines)
display(resized.style.hide().format(precision=2))
same = (resized["by hand"] == resized["smart_resize"]) & (resized["smart_resize"] == resized["processor"])
Markdown(f"""The three agree in **{same.sum()} of {len(same)}** lines. Rounding stretches a picture, here by up to
{resized["stretched, %"].max():.0f} % (a long strip). A box in shares of width and height stretches with it and stays
right; a box in pixels would not.""")

# %% [markdown]
# What is left of a photo? Put together again from the numbers that the model is given, at the 7B budget and at the
# tiny one, with the grid of image tokens. The box is the true one.

# %% tags=["thumbnail"]
seen, true = [], boxes.yxyx_unit_to_xyxy_unit(row["objects"]["bbox"])
for name, (least, most) in budgets.items():
    batch = processor.image_processor(row["image"], min_pixels=least, max_pixels=most, return_tensors="pt")
    picture = plots.seen_picture(batch["pixel_values"], batch["image_grid_thw"][0], processor.image_processor)
    side = (true[0, 2:] - true[0, :2]) * picture.size / 28
    seen.append((f"{name}: {picture.width} x {picture.height}, {len(batch['pixel_values']) // 4} image tokens\n"
                 f"the table: {side[0]:.1f} x {side[1]:.1f} tokens", picture, true))
plots.token_grids(seen)

# %% [markdown]
# And how many tokens does a photo cost? The 7B model is published with a budget of 4 to 16,384 tokens. This project
# trains it with 256 to 1280. Training and use must have the same budget, or the model meets tables of a size that it
# has not learned: so the processor is saved with every result.

# %%
published = {"7b as published: 4 to 16384": (4 * 784, 16384 * 784)}
named = {f"{name}: {least // 784} to {most // 784}": (least, most) for name, (least, most) in budgets.items()}
megapixels = np.geomspace(0.01, 50, 200)
sides = 1000 * np.sqrt(np.outer(megapixels, [3 / 4, 4 / 3]))  # width and height of upright photos
curves = {name: (megapixels, image_tokens(sides, *budget)) for name, budget in (published | named).items()}
display(plots.budget_curves(curves, {"1200 x 1600": 1.92, "3024 x 4032": 12.2}))
cost = [f"**{image_tokens([(3024, 4032)], *budget)[0]:,}** ({name.split(':')[0]})"
        for name, budget in (published | named).items()]
shrunk = by_hand(4032, 3024, *budgets["7b"])[0] / 4032
Markdown(f"""Image tokens of a phone's photo of 3024 × 4032: {", ".join(cost)}. At 1280 tokens its sides shrink
{1 / shrunk:.1f} times, and letters with them: 30 pixels become {30 * shrunk:.0f}, enough to see a table, little to
read it.""")

# %% [markdown]
# ## Tokens → labels
#
# A label is the token that should come next, or -100 where the loss does not look. Two scopes: `assistant`, the
# answer and the `<|im_end|>` that teaches the model to stop; and `all-text`, system message and question too. Vision
# tokens and padding are masked in both. Blue and underlined is trained, grey is masked.

# %%
labels = {scope: collate.Collator(processor, prompt, scope)([row]) for scope in ("assistant", "all-text")}
for scope, batch in labels.items():
    display(Markdown(f"`{scope}`"), plots.label_mask(processor.tokenizer, batch["input_ids"][0], batch["labels"][0]))

# %%
def kind(token):
    """What a trained token is for."""
    text = processor.tokenizer.decode([token])
    return ("coordinates" if text.isdigit() else "end of turn" if text == "<|im_end|>" else
            "markup" if text.startswith("<|") else "words" if any(map(str.isalpha, text)) else "punctuation")


counts = {scope: batch["labels"][batch["labels"] != collate.IGNORED].tolist() for scope, batch in labels.items()}
counts = {scope: pd.Series(map(kind, tokens)).value_counts() for scope, tokens in counts.items()}
counts = pd.DataFrame(counts).fillna(0).astype(int)
display(counts.T.assign(together=counts.sum()))
share = counts.loc["coordinates"] / counts.sum()
boxed = [objects for objects in rows["objects"] if objects["bbox"]]
frames = pd.Series([re.sub(r"\d+", "#", messages.target_text(objects)) for objects in boxed]).value_counts()
Markdown(f"""Where the box is stands in the coordinates alone: **{share["assistant"]:.0%}** of what `assistant` trains
on, **{share["all-text"]:.0%}** of what `all-text` does. With its numbers taken out, the answer is one and the same text
in {frames.max() / len(boxed):.0%} of the rows with a table. So much of the loss is about what hardly varies, and a
small loss is no proof of good boxes: only IoU is.""")

# %% [markdown]
# ## What `max_length` cuts
#
# TRL cuts sequences at `max_length`, by default 1024, and a photo at the 7B budget makes up to 1280 image tokens. Here
# is what happens then, with TRL's own collator, the tiny model and a photo of a phone's size.

# %%
tiny = model.load(settings.TINY_BASE).eval()
tiny_processor = Qwen2VLProcessor.from_pretrained(settings.TINY_BASE, min_pixels=low, max_pixels=high)
large = Qwen2VLProcessor.from_pretrained(settings.TINY_BASE, min_pixels=budgets["7b"][0], max_pixels=budgets["7b"][1])


def outcome(processor, row, max_length):
    """One line: what TRL's collator leaves of a row, and what the model says to it."""
    collator = DataCollatorForVisionLanguageModeling(processor, max_length=max_length, completion_only_loss=True)
    batch = collator([messages.to_messages(row, prompt)])
    trained = batch["labels"][batch["labels"] != collate.IGNORED]
    try:
        with torch.no_grad():
            result = f"loss {tiny(**batch).loss:.2f}"
    except ValueError as error:
        result = f"ValueError: {error}"
    return {"max_length": str(max_length), "tokens": batch["input_ids"].shape[1],
            "trained": len(trained), "end trained": tiny_processor.tokenizer.eos_token_id in trained.tolist(),
            "the model": result}


factor = 4032 / max(row["image"].size)
phone = row | {"image": row["image"].resize([round(side * factor) for side in row["image"].size])}
by_default = SFTConfig.__dataclass_fields__["max_length"].default
display(pd.DataFrame([outcome(large, phone, length) for length in (by_default, None)]).style.hide())
Markdown("This cut is loud. One *behind* the picture is not: a row at this notebook's budget, shortened bit by bit:")

# %%
whole = outcome(tiny_processor, row, None)
lengths = [None] + [whole["tokens"] - cut for cut in (1, 2, 12, whole["trained"], whole["trained"] + 40)]
cuts = pd.DataFrame([outcome(tiny_processor, row, length) for length in lengths])
display(cuts.style.hide())
silent = cuts[~cuts["end trained"] & cuts["the model"].str.startswith("loss")]
display(Markdown(f"""**{len(silent)} of {len(cuts) - 1}** cuts give no error and lose the end of the answer: a model
trained so never learns to stop, and repeats boxes up to the token limit. Where all of the answer is gone the loss is no
number. So this project sets `max_length=None`, and its collator refuses what is too long, by name:"""))
try:
    unbounded = Qwen2VLProcessor.from_pretrained(settings.TINY_BASE, min_pixels=4 * 784, max_pixels=16384 * 784)
    collate.Collator(unbounded, prompt)([phone])
except ValueError as error:
    print(f"ValueError: {error}")

# %% [markdown]
# ## Augmentation with boxes
#
# Another view of a picture is another training picture, if its box moves with it. torchvision's `tv_tensors` carry both
# through one transform. Does it get them right? A mask of the table goes through the same transform, and the outline of
# what is left of it is held against the box that comes out.

# %%
picture = tv_tensors.Image(row["image"].convert("RGB"))
size = picture.shape[-2:]
px = boxes.xyxy_unit_to_xyxy_px(boxes.yxyx_unit_to_xyxy_unit(row["objects"]["bbox"][:1]), size[1], size[0]).round()
table = tv_tensors.BoundingBoxes(px, format="XYXY", canvas_size=size)
(x0, y0, x1, y1), mask = px[0].astype(int), torch.zeros(1, *size, dtype=torch.uint8)
mask[:, y0:y1, x0:x1] = 1


def turn(angle):
    """A turn by exactly `angle` degrees, on a canvas that grows."""
    ground = {tv_tensors.Image: 114, "others": 0}
    return v2.RandomRotation((angle, angle), v2.InterpolationMode.NEAREST, expand=True, fill=ground)


ways = {"as it is": v2.Identity(), "brighter": v2.ColorJitter(brightness=(1.5, 1.5)),
        "mirrored": v2.RandomHorizontalFlip(1), "perspective": v2.RandomPerspective(0.3, 1), "10°": turn(10),
        "10° and back": v2.Compose([turn(10), turn(-10)])}
torch.manual_seed(seed)
views, off = [], {}
for name, way in ways.items():
    view, moved, left = (tensor.as_subclass(torch.Tensor) for tensor in way(picture, table, tv_tensors.Mask(mask)))
    outline = ops.masks_to_boxes(left) + torch.tensor([0, 0, 1, 1])
    off[name] = (moved - outline).abs().max().item()
    across = torch.tensor(view.shape[:0:-1]).repeat(2)  # width, height, width, height
    views.append((f"{name}: {off[name]:.0f} px", v2.functional.to_pil_image(view), moved / across, outline / across))
display(plots.panels(views, columns=6, names=("box that comes out", "outline of the mask")))
*once, (last, twice) = off.items()
Markdown(f"""After one transform the box is right to {max(px for _, px in once):.0f} px; after *{last}* it is off by
**{twice:.0f} px**. A turned box is replaced by the upright hull around it, so a second turn makes a hull of a hull.
Turned by $\\theta$ and back, $w \\times h$ becomes $(w + h \\sin 2\\theta) \\times (h + w \\sin 2\\theta)$:""")

# %%
w, h, there_and_back = x1 - x0, y1 - y0, {}
for angle in (2, 5, 10, 20):
    _, moved, left = v2.Compose([turn(angle), turn(-angle)])(picture, table, tv_tensors.Mask(mask))
    outline, grown = ops.masks_to_boxes(left) + torch.tensor([0, 0, 1, 1]), math.sin(math.radians(2 * angle))
    there_and_back[f"{angle}°"] = {"IoU by hand": w * h / ((w + h * grown) * (h + w * grown)),
                                   "IoU measured": boxes.pairwise_iou(moved.numpy(), outline)[0, 0]}
display(pd.DataFrame(there_and_back).T.round(3))
Markdown("""So this project's own pipeline (`helpers/augment.py`, parameter `augment`) tilts or distorts a picture once
at most. It never mirrors one: mirrored text is no text. What happens depends on seed, epoch and picture alone, so that
a run which was killed and goes on sees the same. One picture, epoch by epoch:""")

# %%
changed = augment.Augment(seed)
views = [("as it is", row["image"], boxes.yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]), [])]
for changed.epoch in range(11):
    view = changed(row)
    views.append((f"epoch {changed.epoch}", view["image"], boxes.yxyx_unit_to_xyxy_unit(view["objects"]["bbox"]), []))
plots.panels(views, columns=6, names=("true box", ""))

# %%
torch.manual_seed(seed)
off, scaled = [], [384, 288, 384, 288]
for objects in boxed[:60]:
    y0, x0, y1, x1 = (np.array(objects["bbox"][0]) * scaled).round().astype(int)
    white = torch.zeros(3, 384, 288, dtype=torch.uint8)
    white[:, y0:y1, x0:x1] = 255
    view, moved = augment.warp(tv_tensors.Image(white), (np.array([[y0, x0, y1, x1]]) / scaled).tolist())
    outline = ops.masks_to_boxes(view[:1].as_subclass(torch.Tensor) > 180).numpy() + [0, 0, 1, 1]
    off.append(np.abs(moved - outline).max())
Markdown(f"""The test with an outline again, now for this pipeline: {len(off)} white boxes on black ground of 288 × 384
pixels go through its geometry. Box and outline differ by {np.median(off):.1f} px (median) and {max(off):.1f} px
(most).""")

# %% [markdown]
# ## Padding
#
# A batch is a rectangle: short sequences are filled up to the longest, and the language model computes on the filling
# too. (The vision tower does not: the patches of all pictures lie behind one another.) How much is wasted? The length
# of a sequence is image tokens by `smart_resize` and text tokens by the tokenizer; a batch of the real collator checks.

# %%
sizes = list(zip(rows["width"], rows["height"], strict=True))
text_tokens = np.array([len(ids) - 1 for ids in processor.tokenizer(collator.texts(list(rows))).input_ids])
lengths, few = image_tokens(sizes, low, high) + text_tokens, min(recipes.SCALES[scale]["batch_size"], len(rows))
mask = collator([rows[i] for i in range(few)])["attention_mask"].float()
Markdown(f"""The first batch of {few} is {mask.shape[1]} tokens long, of which {1 - mask.mean():.2%} are padding;
expected {max(lengths[:few])} and {padding_share(lengths, range(few), few):.2%}.

What if photos come from many phones and cameras? Below, a mix of sizes (an assumption: half of them straight from a
phone, the rest smaller uploads and crops) at the 7B budget, and at the budget that the model is published with.
`grouped` is transformers' `train_sampling_strategy="group_by_length"`; columns are batches of 8 and of 2.""")

# %%
mix = {(3024, 4032): 25, (4032, 3024): 10, (3000, 3000): 5, (2268, 4032): 10, (1200, 1600): 20, (1080, 1920): 10,
       (600, 800): 10, (400, 500): 5, (700, 250): 5}  # per cent  # fmt: skip
rng = np.random.default_rng(seed)
photos = rng.choice(list(mix), 1000, p=np.array(list(mix.values())) / 100)
drawn, lines, orders = rng.choice(text_tokens, len(photos)), [], {}
for name, pictures, text, budget in (("this data", sizes, text_tokens, (low, high)),
                                     ("mix, 7b", photos, drawn, budgets["7b"]),
                                     ("mix, 7b as published", photos, drawn, *published.values())):
    image = image_tokens(pictures, *budget)
    total, line = image + text, {"pictures": name, "tokens, median": np.median(image + text), "most": max(image + text)}
    for size in (8, 2):
        ways = {"shuffled": rng.permutation(len(total)), "grouped": get_length_grouped_indices(
            total.tolist(), size, generator=torch.Generator().manual_seed(seed))}
        line |= {f"{size}, {way}": padding_share(total, order, size) for way, order in ways.items()}
    lines.append(line)
    if pictures is photos:  # every hundredth batch, to look at
        orders |= {f"{name}, {way}": [[(image[i], text[i]) for i in order[at:at + 2]] for at in range(0, 1000, 200)]
                   for way, order in ways.items()}
waste = pd.DataFrame(lines).set_index("pictures")
display(plots.padded_batches(orders), waste.style.format("{:.1%}").format("{:.0f}", ["tokens, median", "most"]))
Markdown(f"""At the 7B budget **{waste.loc["mix, 7b", "2, shuffled"]:.0%}** of shuffled batches of 2 is padding, at the
published one **{waste.loc["mix, 7b as published", "2, shuffled"]:.0%}**: the bound on pixels does much of the work,
because large photos all end near the same length. Grouping by length leaves {waste.loc["mix, 7b", "2, grouped"]:.1%};
its price is that the pictures of a batch resemble each other.""")
