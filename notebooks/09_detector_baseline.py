# %% [markdown]
# # The honest alternative: a plain detector
#
# A vision-language model that writes boxes as text is a long way round to a box. Would a plain object detector have
# served better? This notebook trains **RT-DETR v2** on the same rows, scores it with the same evaluator on the same
# pictures, and counts what each costs.
#
# 1. The same rows, other labels
# 2. The detector beside the VLM: what they consist of
# 3. Training
# 4. Boxes, and which of them to believe
# 5. What a longer training reaches
# 6. Side by side: scores, milliseconds, memory, license
# 7. When to take which
#
# One thing is not equal here. The tiny VLM was pre-trained by this project, on thousands of rendered packs, to find
# *other* things; the small detector starts from random weights. On real photos (`scale = "7b"`) both start
# pre-trained: Qwen2-VL on pictures and text of the web, RT-DETR on COCO.

# %% tags=["parameters"]
scale = "tiny"  # 7b: the real photos and a detector of the Hub, on a GPU
model_id = None  # Hub id or folder of an RT-DETR v2; None: random weights at tiny, PekingU/rtdetr_v2_r18vd at 7b
dataset_id = None  # None: that of the scale
one_class = True  # every table is a "nutrition-table", as Open Food Facts trains; False: the four kinds
side = 160  # pixels: each picture is squeezed to a square of this side; of a model_id its own counts
epochs = None  # None: 4 at tiny, 40 at 7b
batch_size = 8
learning_rate = None  # None: 1e-3 from random weights, 5e-5 from trained ones
augment = False
train_limit = None  # at most so many pictures
val_limit = None
seed = 0
run = None  # a finished run to compare with picture by picture, such as r4-joint
keep = None  # a new folder for the detector, its boxes and its scores; None: they go with the notebook

# %%
from pathlib import Path

from helpers import parameters, topic
from helpers.recipes import SCALES

whole = parameters.default(parameters.whole(1, 10**6))
known = {
    "scale": parameters.one_of(*SCALES), "model_id": parameters.default(parameters.text("a Hub id or a folder")),
    "dataset_id": parameters.default(parameters.text("a Hub id, a local folder, or embedded")),
    "one_class": parameters.flag(), "side": parameters.whole(64, 1280), "epochs": whole,
    "batch_size": parameters.whole(1, 1024), "learning_rate": parameters.default(parameters.number(1e-7, 1.0)),
    "augment": parameters.flag(), "train_limit": whole, "val_limit": whole, "seed": parameters.whole(0, 2**31 - 1),
    "run": parameters.default(parameters.text("the name or folder of a finished run")),
    "keep": parameters.default(parameters.text("a new folder")),
}  # fmt: skip
parameters.given(globals(), known)
parameters.check({name: globals()[name] for name in known}, known)
if side % 32:
    raise parameters.ParameterError(f"side={side} is no multiple of 32, the detector's coarsest step.")
model_path = topic.detector_path(scale, model_id)
epochs = epochs or (40 if scale == "7b" else 4)
learning_rate = learning_rate or (5e-5 if model_path else 1e-3)
other_run = topic.scored_run(run) if run else None
if keep and any(Path(keep).glob("*")):
    raise parameters.ParameterError(f"keep={keep!r} holds something already; expected a new folder.")

# %%
from helpers import runs

runs.quiet_libraries()
import json
import tempfile

import pandas as pd
import torch
from IPython.display import Markdown, display
from transformers import AutoConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, TrainingArguments

from helpers import data, detector, evaluate, model, plots, predict, sizes
from helpers.augment import Augment
from helpers.boxes import CATEGORIES
from helpers.plots import detector as draw

# %%
chosen = SCALES[scale]
limit = {"train": train_limit, "val": val_limit, "selection": val_limit}
raw = data.load_raw(dataset_id or chosen["dataset_id"], limit={name: n for name, n in limit.items() if n})
rows = data.prepare(data.clean(raw, data.audit(raw)), chosen["min_pixels"], chosen["max_pixels"])
truth = {name: data.truth_rows(rows[name]) for name in ("train", "selection", "val")}
found = {name for row in truth["train"] for name in row["objects"]["category_name"]}
names = ["nutrition-table"] if one_class else [*filter(found.__contains__, CATEGORIES), *sorted(found - {*CATEGORIES})]
print({name: len(split) for name, split in rows.items()}, "classes:", *names)

# %% [markdown]
# ## 1 · The same rows, other labels
#
# The VLM's label is a text: a name and whole thousandths, one token after the other. The detector's label is four real
# numbers a box (centre, width and height in 0–1) and a class. Its image processor makes them, and squeezes the picture
# to a square: boxes in 0–1 do not change by that.

# %%
torch.manual_seed(seed)
if model_path:
    rtdetr, processor = detector.load(model_path, names)
else:
    rtdetr, processor = detector.small(names, side)
changed = Augment(seed) if augment else None
collator = detector.Collator(processor, names, changed)
two = [rows["train"][i] for i in range(min(2, len(rows["train"])))]
batch = collator(two)
display(draw.as_seen(two, batch))
label, row = batch["labels"][0], two[0]
seen = tuple(batch["pixel_values"][0].shape)
Markdown(f"The first picture of {row['width']} × {row['height']} pixels becomes {seen}. "
         f"Its row has {[[round(x, 3) for x in box] for box in row['objects']['bbox']]} (y first, corners), and the "
         f"label is {[[round(x, 3) for x in box] for box in label['boxes'].tolist()]}, class "
         f"{label['class_labels'].tolist()}.")

# %% [markdown]
# ## 2 · What they consist of
#
# RT-DETR: a convolutional backbone gives maps of three coarsenesses; an encoder mixes them; the best places become
# *queries*, which a decoder refines to boxes with a score each. No text, no anchors to tune, no suppression of
# doubles: training matches queries and true boxes one to one. All boxes come out of one pass; the VLM needs one pass a
# token.

# %%
vlm_path = topic.model_path(scale)
with torch.device("meta"):  # its shapes, no memory yet
    shapes = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(vlm_path))
parts = pd.Series({name: model.count(weight) for name, weight in rtdetr.named_parameters()})
parts = parts.groupby(lambda name: name.split(".")[1] if name.startswith("model.") else name.split(".")[0]).sum()
display(parts.sort_values(ascending=False).rename("weights, RT-DETR").to_frame().T)
display(pd.Series(sizes.parameters_by_part(shapes), name="weights, Qwen2-VL").to_frame().T)
weights = {"detector": int(parts.sum()), "VLM": sum(sizes.parameters_by_part(shapes).values())}
Markdown(f"The detector has {weights['detector'] / 1e6:.1f} million weights, all of which train; the VLM "
         f"{weights['VLM'] / 1e6:.1f} million, {weights['VLM'] / weights['detector']:.0f} times as many.")

# %% [markdown]
# ## 3 · Training
#
# transformers' own `Trainer`; RT-DETR computes its loss itself: matching, classes, corner distance and overlap, for
# every layer of the decoder.

# %%
scratch = Path(keep or tempfile.mkdtemp())
batch_size = min(batch_size, len(rows["train"]))
arguments = TrainingArguments(
    output_dir=str(scratch / "training"),
    num_train_epochs=epochs,
    per_device_train_batch_size=batch_size,
    learning_rate=learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    weight_decay=1e-4,
    max_grad_norm=0.1,
    remove_unused_columns=False,  # the collator wants the rows whole
    dataloader_drop_last=True,  # batch norm of a few left over is noise
    dataloader_num_workers=4 if torch.cuda.is_available() else 0,
    use_cpu=not torch.cuda.is_available(),
    logging_steps=min(5, epochs * (len(rows["train"]) // batch_size)),
    save_strategy="no",
    report_to="none",
    seed=seed,
)
trained = detector.train(rtdetr, arguments, collator, rows["train"])
display(plots.loss_curves({"RT-DETR": trained["log"]}, smooth=9))
losses = [line["loss"] for line in trained["log"] if "loss" in line]
fifth = max(1, len(losses) // 5)
Markdown(f"Training for {epochs} epochs on {trained['pictures']} pictures took {trained['seconds']:.0f} s "
         f"({1000 * trained['seconds'] / epochs / trained['pictures']:.0f} ms a picture and epoch, {runs.machine()}). "
         f"The loss, a sum over all layers, went from {sum(losses[:fifth]) / fifth:.1f} in the first fifth to "
         f"{sum(losses[-fifth:]) / fifth:.1f} in the last.")

# %% [markdown]
# ## 4 · Boxes, and which of them to believe
#
# A detector gives a box for *every* query, with a score; most are worth nothing. A mean IoU that could pick the best of
# twenty guesses would flatter it, so a threshold decides what counts as an answer. It is chosen on `selection`, by F1,
# and used on `val`; a picture whose boxes all stay below it counts as IoU 0. AP alone takes all boxes, ranked by their
# scores: that is what it is for.

# %%
guesses = {name: detector.predict(rtdetr, processor, rows[name]) for name in ("selection", "val")}
threshold, f1 = detector.best_threshold(truth["selection"], guesses["selection"])
answers = evaluate.keep_confident(guesses["val"], threshold)
constant = evaluate.constant_predictions(evaluate.best_constant_box(truth["train"]), truth["val"])
metrics = evaluate.write_metrics(scratch, {"fine-tuned": answers, "constant box": constant}, truth["val"])
scores = {"detector": metrics["scores"]["fine-tuned"],
          "detector, all boxes": evaluate.score(truth["val"], guesses["val"])}
display(evaluate.metrics_table(metrics).rename(index={"fine-tuned": "detector"}))
kept, all_boxes = (sum(len(line["boxes"]) for line in lines) for lines in (answers, guesses["val"]))
if keep:
    record = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "augment": augment,
              "seed": seed, "train": runs.rows_hash(rows["train"]), "machine": runs.machine()} | trained
    detector.save(rtdetr, processor, scratch / "model", {name: record[name] for name in record if name != "log"})
tables = sum(len(row["objects"]["bbox"]) for row in truth["val"])
Markdown(f"On `selection` a threshold of {threshold:.2f} has the best F1 ({f1:.3f}). On `val` it keeps {kept} of "
         f"{all_boxes} boxes for {tables} tables. AP of the kept ones "
         f"is {evaluate.with_interval(scores['detector']['summary']['ap'])}, of all "
         f"{evaluate.with_interval(scores['detector, all boxes']['summary']['ap'])}.")

# %% [markdown]
# ## 5 · What a longer training reaches
#
# Detectors of this family are slow to learn from nothing: DETR's authors had success with ten to fifteen thousand
# pictures and had not tried fewer ([their words](https://github.com/facebookresearch/detr/issues/125)). So the same
# small detector was also trained for longer (its weights are in `09_detector/`), and is asked here about the same
# pictures.

# %%
shown, longer = answers, None
if scale == "tiny":
    story = json.loads((detector.LONGER / "trained.json").read_text())
    patient, its_processor = detector.load(str(detector.LONGER))
    told = {name: detector.predict(patient, its_processor, rows[name]) for name in ("selection", "val")}
    its_threshold, _ = detector.best_threshold(truth["selection"], told["selection"])
    shown = evaluate.keep_confident(told["val"], its_threshold)
    longer = evaluate.score(truth["val"], shown)
    scores |= {"longer": longer, "longer, all boxes": evaluate.score(truth["val"], told["val"])}
    gain = evaluate.paired_bootstrap(longer["per_picture"], scores["detector"]["per_picture"])["difference"]
    same = story["train"] == runs.rows_hash(rows["train"])
    took = (f"{story['cpu_seconds'] / 60:.0f} minutes of CPU time" if "no GPU" in story["machine"]
            else f"{story['seconds'] / 60:.0f} minutes, {story['machine']}")
    display(Markdown(
        f"{story['epochs']} epochs (learning rate {story['learning_rate']:g}, "
        f"{'with' if story['augment'] else 'without'} augmentation, {took}) reach a mean IoU of "
        f"**{evaluate.with_interval(longer['summary']['mean_iou'])}** and an F1 of "
        f"{evaluate.with_interval(longer['summary']['f1'])}. Minus the training above, on the same pictures: "
        f"{evaluate.with_interval(gain)} mean IoU. "
        + ("" if same else "It was trained on other rows than those here. ")
        + (f"How it went: {story['note']}. " if "note" in story else "")
        + f"Again: `papermill 09_detector_baseline.ipynb out.ipynb -p epochs {story['epochs']} -p learning_rate "
        f"{story['learning_rate']:g} -p augment {story['augment']} -p keep detector`."))

# %% tags=["thumbnail"]
with_tables = [i for i, row in enumerate(truth["val"]) if row["objects"]["bbox"]][:12]
plots.gallery(rows["val"].select(with_tables), truth["val"], shown)

# %%
seen = (longer or scores["detector"])["summary"]
shares = {name: f"{100 * (seen[name]['value'] or 0):.0f} %" for name in ("detection_rate", "surplus_rate", "precision")}
Markdown(f"""The first pictures of `val` with the boxes above the threshold{' (longer training)' if longer else ''}. On
the whole of `val` it finds a box in {shares['detection_rate']} of the pictures with a table, and more boxes than there
are tables in {shares['surplus_rate']} of all; {shares['precision']} of its boxes are right (IoU above .5). A VLM itself
decides how many boxes it writes; a detector leaves that to a threshold.""")

# %% [markdown]
# ## 6 · Side by side
#
# **Scores.** The VLM's rows are those of `results.json`, made by whole runs on the same `val`.

# %%
ledger = json.loads((topic.RUNS.parent / "results.json").read_text())["rows"]
vlms = {name.partition("/")[2]: entry for name, entry in ledger.items() if name.startswith(f"{scale}/")}
table = {name: {"n": entry["mean_iou"]["n"], "mean IoU (95 %)": evaluate.with_interval(entry["mean_iou"]),
                "IoU > .5": f"{100 * entry['iou_over_50']:.0f} %", "F1": entry["f1"], "AP": entry["ap"]}
         for name, entry in vlms.items()}  # fmt: skip
for name, words in (("detector", f"RT-DETR, {epochs} epochs"), ("longer", "RT-DETR, longer")):
    if name in scores:
        summary = scores[name]["summary"]
        table[words] = {
            "n": summary["mean_iou"]["n"], "mean IoU (95 %)": evaluate.with_interval(summary["mean_iou"]),
            "IoU > .5": f"{100 * summary['iou_over_50']['value']:.0f} %", "F1": round(summary["f1"]["value"], 4),
            "AP": round(scores[f"{name}, all boxes"]["summary"]["ap"]["value"], 4)}  # fmt: skip
display(pd.DataFrame(table).T)
if other_run:
    for name in (name for name in ("detector", "longer") if name in scores):
        paired = evaluate.paired_bootstrap(scores[name]["per_picture"], other_run["per_picture"])
        print(f"{name} minus {run}: {evaluate.with_interval(paired['difference'])} mean IoU; {paired['verdict']}")

# %% [markdown]
# **Speed and memory**, both models on this machine, in turns, the shortest of three times. Reading the picture counts
# for both. The VLM answers as the base does here; a fine-tuned one of the same size takes as long a token.

# %%
model.patches_as_product()
vlm = model.load(vlm_path, dtype=torch.bfloat16, attn_implementation=model.attention(training=False),
                 device_map=model.device_map()).eval()
vlm_processor = Qwen2VLProcessor.from_pretrained(
    vlm_path, min_pixels=chosen["min_pixels"], max_pixels=chosen["max_pixels"])
prompt, options = "Detect the bounding box of the nutrition table.", {"max_new_tokens": 64, "do_sample": False}
eight = rows["val"].select(range(min(8, len(rows["val"]))))
calls = {
    ("RT-DETR", 1): lambda: detector.predict(rtdetr, processor, eight.select([0])),
    ("Qwen2-VL", 1): lambda: predict.generate_lines(vlm, vlm_processor, [eight[0]], prompt, options),
    ("RT-DETR", 8): lambda: detector.predict(rtdetr, processor, eight),
    ("Qwen2-VL", 8): lambda: predict.generate_lines(vlm, vlm_processor, list(eight), prompt, options),
}
times = detector.seconds(calls)
cost = {}
for name, net in (("RT-DETR", rtdetr), ("Qwen2-VL", vlm)):
    peak = detector.peak_bytes(calls[name, 8])
    cost[name] = {
        "weights, millions": round(weights["detector" if name == "RT-DETR" else "VLM"] / 1e6, 1),
        "weights, MB": round(sum(weight.nbytes for weight in net.parameters()) / 1e6, 1),
        "ms, one picture": round(1000 * times[name, 1], 1),
        "ms a picture, 8 at once": round(1000 * times[name, 8] / 8, 1),
        "more memory for 8, MB": None if peak is None else round(peak / 1e6)}  # fmt: skip
display(pd.DataFrame(cost).T)
faster = {n: times["Qwen2-VL", n] / times["RT-DETR", n] for n in (1, 8)}
Markdown(f"One picture: the detector is **{faster[1]:.1f} times** as fast; eight at once: {faster[8]:.1f} times. At "
         "full scale RT-DETR v2 r18 has 20 million weights and Qwen2-VL 8.3 thousand million, 400 times as many.")

# %% [markdown]
# **License and care.**
#
# | | RT-DETR v2 | YOLOv8n, as Open Food Facts runs it | Qwen2-VL-7B, fine-tuned |
# |---|---|---|---|
# | license | Apache-2.0, code and weights | AGPL-3.0: what serves it over a network has to be open too | Apache-2.0 |
# | classes | fixed when trained | fixed when trained | asked for in words |
# | score of a box | trained to be one | trained to be one | from token probabilities |
# | what else it can do | nothing | nothing | read, describe, answer |
# | runs on | a CPU | a CPU, a phone | a GPU: weights of 17 GB, about 7 in 4 bits |
#
# ## 7 · When to take which

# %%
best = max((name for name in vlms if name not in ("constant box", "base")), key=lambda n: vlms[n]["mean_iou"]["value"],
           default=None)
words = []
if best:
    vlm_iou = vlms[best]["mean_iou"]
    for name in (name for name in ("detector", "longer") if name in scores):
        iou = scores[name]["summary"]["mean_iou"]
        how = ("above it" if (iou["low"] or 0) > vlm_iou["high"] else "below it" if (iou["high"] or 1) < vlm_iou["low"]
               else "with intervals that overlap")
        words.append(f"the detector{' after the longer training' if name == 'longer' else ''} at "
                     f"{evaluate.with_interval(iou)}, {how}")
    words = [f"Here the best fine-tuned VLM, {best}, stands at a mean IoU of {evaluate.with_interval(vlm_iou)}; "
             + "; ".join(words) + "."]
    mine = [scores[name]["summary"]["mean_iou"] for name in ("detector", "longer") if name in scores]
    reached = max(iou["high"] or iou["value"] for iou in mine) >= vlm_iou["low"]
    words += ["Even from random weights it comes within reach: for one fixed class the simple model is enough."
              if reached and not model_path else "" if model_path else
              f"From random weights and {len(rows['train'])} pictures the detector does not get there: it needs a "
              "pre-trained start, or more pictures and patience."]
Markdown(f"""{' '.join(words)} The detector is {faster[1]:.1f} times as fast a picture, with
{weights['detector'] / 1e6:.1f} million weights against {weights['VLM'] / 1e6:.1f}.

**Take a detector** where the classes are fixed, pictures come by the million or must be answered on a CPU or a phone, a
score is needed that ranks boxes, and there is a pre-trained one to start from. For nutrition tables alone, at Open Food
Facts' volume, that is the reasonable choice, and RT-DETR does it without AGPL.

**Take the VLM** where pictures with boxes are few, the question changes (another object is another prompt), the next
step reads the table anyway and one model should do both, or boxes need the meaning of a text and not only its look.

**What this comparison cannot say**: the small detector began from random weights and the tiny VLM from a pre-trained
base, and both saw rendered packs. For real photos run it at `scale = "7b"`, where both start pre-trained.""")

# %% [markdown]
# ## At full scale
#
# ```sh
# papermill 09_detector_baseline.ipynb out.ipynb -p scale 7b -p run r4-joint -p keep ../runs/detector
# make compare A=r4-joint B=runs/detector
# ```
#
# takes `PekingU/rtdetr_v2_r18vd` from the Hub, gives it a new head for these classes and trains it on the 1083 real
# photos; `-p model_id PekingU/rtdetr_v2_r50vd` takes the larger one, `-p augment True` the project's augmentation, and
# `-p one_class False` the four kinds of table. `keep` holds the detector (`model/`), its boxes in the same lines as
# every run's `predictions.jsonl`, and `metrics.json`, which `make compare` reads.
