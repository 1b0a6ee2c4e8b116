# %% [markdown]
# # The honest alternative: a plain detector
#
# To write boxes as text with a vision-language model (VLM) is a long way to a box. Would a plain object detector do
# better? This notebook trains **RT-DETR v2** on the same rows, scores it with the same evaluator on the same
# pictures, and counts what each costs.
#
# 1. The same rows, other labels
# 2. Training
# 3. Boxes, and which of them to keep
# 4. After a longer training
# 5. Side by side: scores, milliseconds, weights, license
# 6. When to take which
#
# One thing is not equal here. The tiny VLM was pre-trained by this project on thousands of rendered packs, to find
# *other* things; the small detector starts from random weights. On real photos (`scale = "7b"`) both start pre-trained:
# Qwen2-VL on pictures and text of the web, RT-DETR on COCO.

# %% tags=["parameters"]
scale = "tiny"  # 7b: the real photos, on a GPU
detector_id = None  # Hub id or folder of an RT-DETR v2 (PekingU/rtdetr_v2_r18vd); None: a small one, random weights
dataset_id = None  # None: that of the scale
one_class = True  # every table is a "nutrition-table", as Open Food Facts trains; False: the kinds that the data has
epochs = 4
learning_rate = 1e-3  # 5e-5 for a detector that is trained already
augment = False
train_limit = None  # at most so many pictures
val_limit = None
seed = 0
keep = None  # a new folder for the detector, its boxes and its scores, for `make compare`; None: they are not kept

# %%
from helpers.topics.opening import model_path, opening

opening(globals(), "dataset_id", "learning_rate", "train_limit", "val_limit", "seed", scale=("tiny", "7b"),
        detector_id="a Hub id or a folder, or None", one_class=bool, epochs=range(1, 10**6), augment=bool,
        keep="a new folder, or None")
vlm_path = model_path(scale, None)

# %%
import json
import tempfile
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Markdown
from torch.utils.benchmark import Timer
from transformers import PrinterCallback, Qwen2VLProcessor, Trainer, TrainingArguments, set_seed

from helpers import data, evaluate, model, plots, predict, runs
from helpers.augment import Augment
from helpers.evaluate import reports
from helpers.recipes import SCALES
from helpers.topics import detector
from helpers.topics.training import PROMPT, load

# %% [markdown]
# ## 1 · The same rows, other labels
#
# The VLM's label is a text: a name and integers in 0–1000, one token after the other. The detector's label is four real
# numbers for each box (center, width and height in 0–1) and a class. Its image processor makes them, and resizes the
# picture to a square. That does not change boxes in 0–1.

# %%
budget = {name: SCALES[scale][name] for name in ("min_pixels", "max_pixels")}
limit = {"train": train_limit, "val": val_limit, "selection": val_limit}
raw = data.load_raw(dataset_id, limit={name: n for name, n in limit.items() if n})
rows = data.prepare(data.clean(raw, data.audit(raw)), **budget)
truth = {name: data.truth_rows(rows[name]) for name in ("train", "selection", "val")}
several = not one_class or evaluate.match.by_class(truth["train"])  # the classes of a data set of your own
names = data.names_in(rows["train"]) if several else ["nutrition-table"]

# %%
set_seed(seed)
rtdetr, processor = detector.load(detector_id, names) if detector_id else detector.small(names, side=160)
collator = detector.Collator(processor, names, change := Augment(seed) if augment else None)
first = rows["train"][0]
batch = collator([first])
print(f"picture  {first['width']} × {first['height']} → {tuple(batch['pixel_values'][0].shape)}\n"
      f"row      y first, corners:        {torch.tensor(first['objects']['bbox'])}\n"
      f"label    center, width, height:   {batch['labels'][0]['boxes']}, class {names}")

# %% [markdown]
# ## 2 · Training
#
# RT-DETR has a convolutional backbone, which gives feature maps at three scales, and an encoder, which mixes them. The
# best places become *queries*, and a decoder refines each to a box with a score. There is no text, there are no
# anchors, and duplicates need not be suppressed, because training matches queries and true boxes one to one. All boxes
# come out of one pass; the VLM needs one pass a token.
#
# The trainer is transformers' own. The model computes its loss itself: matching, classes, distance of the corners, and
# overlap, for every layer of the decoder.

# %%
scratch = Path(keep or tempfile.mkdtemp())
arguments = TrainingArguments(
    output_dir=str(scratch / "training"),
    num_train_epochs=epochs,
    per_device_train_batch_size=min(8, len(rows["train"])),
    learning_rate=learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    weight_decay=1e-4,
    max_grad_norm=0.1,
    remove_unused_columns=False,  # the collator wants the rows whole
    dataloader_drop_last=True,  # batch norm of a few left over is noise
    use_cpu=not torch.cuda.is_available(),
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    seed=seed,
)

# %%
trainer = Trainer(rtdetr, arguments, data_collator=collator, train_dataset=rows["train"],
                  callbacks=[change] if change else None)  # tells the augmentation the epoch
trainer.remove_callback(PrinterCallback)
took = trainer.train().metrics["train_runtime"]
print(f"{epochs} epochs on {len(rows['train'])} pictures took {took:.0f} s ({runs.machine()})")
plots.loss_curves({"RT-DETR": trainer.state.log_history}, smooth=9)

# %% [markdown]
# ## 3 · Boxes, and which of them to keep
#
# A detector gives a box for *every* query, with a score, and most of them are worth nothing. A mean IoU that could pick
# the best of twenty guesses would be too high. So a threshold decides what counts as a box: it is chosen on
# `selection`, by F1, and used on `val`. A picture whose boxes are all below it counts as IoU 0. Only AP takes all
# boxes, ranked by their scores, so it follows in section 5.

# %%
def scored(vlm, image_processor):
    """The boxes for val above the threshold, their score, and the AP of all boxes."""
    guesses = {name: detector.predict(vlm, image_processor, rows[name]) for name in ("selection", "val")}
    threshold = detector.best_threshold(truth["selection"], guesses["selection"])
    kept = evaluate.keep_confident(guesses["val"], threshold)
    print(f"threshold {threshold:.2f} keeps {sum(len(line['boxes']) for line in kept)} of "
          f"{sum(len(line['boxes']) for line in guesses['val'])} boxes")
    return kept, evaluate.score(truth["val"], kept), evaluate.score(truth["val"], guesses["val"])["summary"]["ap"]


# %%
found, score, ap = scored(rtdetr, processor)
constant = evaluate.constant_predictions(evaluate.best_constant_box(truth["train"]), truth["val"])
metrics = reports.write_metrics(scratch, {"fine-tuned": found, "constant box": constant}, truth["val"])
if keep:
    rtdetr.save_pretrained(scratch / "model")
    processor.save_pretrained(scratch / "model")
reports.metrics_table(metrics).drop(columns=["AP", "never stopped"]).rename(index={"fine-tuned": "detector"})

# %% [markdown]
# ## 4 · After a longer training
#
# Detectors of this family learn slowly from random weights: DETR's authors had success with ten to fifteen thousand
# pictures and had not tried fewer ([their words](https://github.com/facebookresearch/detr/issues/125)). So the same
# small detector was also trained for longer on the embedded pictures, with augmentation. Its weights are in
# `09_detector/`. Is it better? Only if the interval does not contain 0.

# %%
story = json.loads((detector.LONGER / "trained.json").read_text())
longer, longer_score, longer_ap = scored(*detector.load(detector.LONGER))
gain = evaluate.paired_bootstrap(longer_score["per_picture"], score["per_picture"])
print(f"{story['epochs']} epochs, {story['cpu_seconds'] / 60:.0f} minutes of CPU time. Mean IoU minus that of the "
      f"training above: {evaluate.with_interval(gain['difference'])}.")

# %%
with_tables = [i for i, row in enumerate(truth["val"]) if row["objects"]["bbox"]][:6]
plots.gallery(rows["val"].select(with_tables), truth["val"], longer)

# %% [markdown]
# ## 5 · Side by side
#
# **Scores.** The rows of the VLM are those of `results.json`, from whole runs on the same `val`. AP is over all boxes.

# %%
ledger = json.loads((detector.LONGER.parents[1] / "results.json").read_text())["rows"]
table = {name.partition("/")[2]: {"mean IoU": evaluate.with_interval(row["mean_iou"]), "F1": row["f1"], "AP": row["ap"]}
         for name, row in ledger.items() if name.startswith(f"{scale}/")}
for name, one, ap_of_all in ((f"RT-DETR, {epochs} epochs", score, ap), ("RT-DETR, longer", longer_score, longer_ap)):
    summary = one["summary"]
    table[name] = {"mean IoU": evaluate.with_interval(summary["mean_iou"]), "F1": summary["f1"]["value"],
                   "AP": ap_of_all["value"]}
pd.DataFrame.from_dict(table, orient="index").round(3)

# %% [markdown]
# **Speed.** Both models on this machine, with the processing of the pictures. The VLM is the base, which takes as long
# for a token as a fine-tuned model.

# %%
vlm = load(path=vlm_path)
vlm.set_attn_implementation(model.attention(training=False))
vlm_processor, greedy = Qwen2VLProcessor.from_pretrained(vlm_path, **budget), {"max_new_tokens": 64, "do_sample": False}
calls = {"RT-DETR": (rtdetr, lambda few: detector.predict(rtdetr, processor, few)),
         "Qwen2-VL": (vlm, lambda few: predict.generate_lines(vlm, vlm_processor, list(few), PROMPT, greedy))}

# %%
cost = {}
for name, (net, call) in calls.items():
    cost[name] = {"weights, millions": net.num_parameters() / 1e6}
    for size in (1, 8):
        few = rows["val"].select(range(min(size, len(rows["val"]))))
        took = Timer("call(few)", globals={"call": call, "few": few}).timeit(3).median / len(few)
        cost[name][f"ms a picture, {size} at once"] = 1000 * took
cost = pd.DataFrame(cost).T
faster = cost.loc["Qwen2-VL"] / cost.loc["RT-DETR"]
print(f"The detector is {faster.iloc[1]:.0f} times as fast for one picture, {faster.iloc[2]:.0f} times for eight.")
cost.round(1)

# %% [markdown]
# **License and use.**
#
# | | RT-DETR v2 | YOLOv8n, as Open Food Facts runs it | Qwen2-VL-7B, fine-tuned |
# |---|---|---|---|
# | license | Apache-2.0, code and weights | AGPL-3.0: what serves it over a network has to be open too | Apache-2.0 |
# | classes | fixed when trained | fixed when trained | named in the prompt |
# | score of a box | trained to be one | trained to be one | from token probabilities |
# | what else it can do | nothing | nothing | read, describe, answer |
# | runs on | a CPU | a CPU, a phone | a GPU |
#
# ## 6 · When to take which

# %%
best = max((name for name in table if name.startswith("r")), key=lambda name: table[name]["AP"], default="base")
Markdown(f"""Here {best} has a mean IoU of **{table[best]["mean IoU"]}**. The detector has
**{table[f"RT-DETR, {epochs} epochs"]["mean IoU"]}** after {epochs} epochs on {len(rows["train"])} pictures, and
{table["RT-DETR, longer"]["mean IoU"]} after the longer training.""")

# %% [markdown]
# From random weights and a thousand pictures, a detector does not become good in minutes. It needs a pre-trained model
# to start from, or more pictures and more time.
#
# **Take a detector** where the classes are fixed, where pictures come by the million or must be processed on a CPU or a
# phone, where a score must rank boxes, and where there is a pre-trained one to start from. For nutrition tables alone,
# at the volume of Open Food Facts, that is the reasonable choice, and RT-DETR does it without AGPL.
#
# **Take the VLM** where pictures with boxes are few, where the task changes (another object is another prompt), where
# the next step reads the table anyway and one model should do both, or where boxes need the meaning of a text and not
# only its look.
#
# **What this comparison cannot say**: which is better on real photos. The small detector started from random weights
# and the tiny VLM from a pre-trained base, and both were trained on rendered packs. At full scale both start
# pre-trained:
#
# ```sh
# papermill notebooks/09_detector_baseline.ipynb out.ipynb --cwd notebooks -p scale 7b \
#     -p detector_id PekingU/rtdetr_v2_r18vd -p epochs 40 -p learning_rate 5e-5 -p keep ../runs/detector
# make compare A=r4-joint B=runs/detector
# ```
#
# The folder `keep` then has the detector (`model/`), its boxes in the same format as every run's `predictions.jsonl`,
# and `metrics.json`, which `make compare` reads.
