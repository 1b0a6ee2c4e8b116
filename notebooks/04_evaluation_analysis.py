# %% [markdown]
# # How good is a model, and how sure are we?
#
# A fine-tuned vision-language model writes text. Whether its boxes are good, and whether one recipe is better than
# another, has to be measured, and the measure must say how sure it is. This notebook analyses the runs on disk: what
# the scores count, intervals, paired comparisons, errors by kind, confidence, prompts, the best and the worst pictures.
#
# If there is no run yet, it makes a small one first (a minute on two cores). Real ones come from `make run
# RECIPE=r4-joint` or `make recipes`.

# %% tags=["parameters"]
run = None  # a run's name, such as r4-joint; None: the best one found
runs_dir = "../runs"  # where runs are
train_pictures = 160  # of the small run, where there is none
val_pictures = 60
selection_pictures = 60  # on which a threshold is chosen
prompt_pictures = 20  # for every prompt

# %%
from helpers.topics.opening import opening

opening(globals(), run="a run's name, or None", runs_dir="a folder of runs", train_pictures=range(8, 10**6),
        val_pictures=range(8, 10**6), selection_pictures=range(8, 10**6), prompt_pictures=range(2, 10**6))

import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from IPython.display import display
from matplotlib import pyplot as plt
from transformers import Qwen2VLProcessor

import helpers
from helpers import data, evaluate, model, plots, predict
from helpers.evaluate import reports
from helpers.settings import TINY_BASE

# %% [markdown]
# ## The runs
#
# A run's folder has its predictions, the truth they were scored against, and its metrics. Two runs can be compared if
# they were scored on the same pictures.

# %%
if run is None and not reports.find_runs(runs_dir):
    print("No scored run on disk: a small one is made. A real one: make run RECIPE=r4-joint")
    runs_dir, program = tempfile.mkdtemp(), Path(helpers.__file__).parents[1] / "pipeline.py"
    subprocess.run([sys.executable, program, "recipe=r1-llm-only", "scale=tiny", f"train_limit={train_pictures}",
                    f"val_limit={val_pictures}", f"output_root={runs_dir}", "run_name=small", "report_to=none"],
                   check=True, capture_output=True)  # fmt: skip
found = {one["run"]: one for one in reports.find_runs(runs_dir) if "fine-tuned" in one["metrics"]["scores"]}
if run is not None and run not in found:
    raise ValueError(f"no scored run {run!r} in {runs_dir}; there: {', '.join(found) or 'none'}.")
iou = {name: one["metrics"]["scores"]["fine-tuned"]["summary"]["mean_iou"] for name, one in found.items()}
chosen = found[run or max(iou, key=lambda name: iou[name]["value"])]
peers = [one for one in found.values() if one["metrics"]["truth"]["hash"] == chosen["metrics"]["truth"]["hash"]]
pd.DataFrame({one["run"]: {"recipe": one["recipe"], "mean IoU (95 %)": evaluate.with_interval(iou[one["run"]])}
              for one in peers}).T  # fmt: skip

# %% [markdown]
# ## What the numbers count
#
# A picture's IoU is the mean over its true boxes. Boxes and truth are matched one to one for the greatest sum of IoU,
# whatever their order. A miss counts as 0, and a box that matches none costs precision. The constant box, the one box
# that fits the training pictures best, is what a model must beat to show that it uses the picture.

# %%
folder = Path(runs_dir) / f"{reports.PREFIX}{chosen['run']}"
scores, truth = chosen["metrics"]["scores"], predict.read_jsonl(folder / "truth.jsonl")
predictions = {name: predict.read_jsonl(folder / reports.FILES[name]) for name in scores}
tuned = scores["fine-tuned"]
print(f"run {chosen['run']}:")
reports.metrics_table(chosen["metrics"])

# %% [markdown]
# Bad input must not raise the score. We spoil the predictions on purpose: one is missing, one is there twice, one is
# for an unknown picture, one is a box without area. The evaluator names each of them.

# %%
spoiled = [dict(line) for line in predictions["fine-tuned"]]
flat = next(line for line in spoiled[2:] if line["boxes"])
flat["boxes"] = [[0.2, 0.2, 0.2, 0.6]] * len(flat["boxes"])
spoiled = [*spoiled[1:], spoiled[1], spoiled[0] | {"image_id": "stranger"}]
named = evaluate.score(truth, spoiled, resamples=0)
display(pd.Series({kind: ", ".join(ids) for kind, ids in named["problems"].items()}, name="named").to_frame())
print(f"n stays {named['summary']['mean_iou']['n']}: what is missing or broken counts as 0, not as absent.")

# %% [markdown]
# ## How sure a mean is
#
# A bootstrap over pictures gives the 95 % interval: how far the mean would move with other pictures of the same kind.
# The interval shrinks with the square root of their number.

# %%
for n in (12, 25, 50, len(truth)):
    few = evaluate.score(truth[:n], predictions["fine-tuned"][:n])["summary"]["mean_iou"]
    print(f"first {n:3} pictures: mean IoU {evaluate.with_interval(few)}")

# %% [markdown]
# ## Two models on the same pictures
#
# Some pictures are hard for every model. In a comparison picture by picture that part cancels, so a difference can be
# significant although the two separate intervals overlap. `pictures needed` is for a difference of this size to be
# found four times in five. The same from the command line: `make compare A=r4-joint B=r1-llm-only`.

# %%
rivals = {name: other for name, other in scores.items() if name != "fine-tuned"}
rivals |= {one["run"]: one["metrics"]["scores"]["fine-tuned"] for one in peers if one is not chosen}
pairs = {name: evaluate.paired_bootstrap(tuned["per_picture"], other["per_picture"]) for name, other in rivals.items()}
pd.DataFrame({f"{chosen['run']} minus {name}": {
    "mean IoU": evaluate.with_interval(pair["difference"]), "verdict": pair["verdict"],
    "pictures needed": pair["pictures_needed"]} for name, pair in pairs.items()}).T  # fmt: skip

# %% [markdown]
# Pictures are one source of chance, the seed of the training is the other. Runs named `r4-joint-s1`, `r4-joint-s2` (`-p
# seed 1 -p run_name r4-joint-s1`) count as further seeds of `r4-joint`, and `make table` draws its interval over seeds
# and pictures.
#
# ## Where the IoU lies
#
# A mean says nothing about its parts. First the pictures by IoU, and the share of them that reaches at least that IoU.
# Then the mean IoU by the area of the true box and by the rotation of the picture, with intervals: a group of few
# pictures says little.

# %%
plots.iou_curves({name: predictions[name] for name in ("constant box", "base", "fine-tuned")}, truth)

# %%
figure, grid = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
groups = {"by_size": ("mean_iou_boxes", "area of the true box, share of the picture", "mean IoU of boxes"),
          "by_rotation": ("mean_iou", "rotation of the picture, degrees", "mean IoU of pictures")}
for axes, (group, (metric, across, upwards)) in zip(grid, groups.items(), strict=True):
    for name, marker in (("constant box", "o"), ("base", "s"), ("fine-tuned", "D")):
        means = {f"{key}\nn = {part[metric]['n']}": part[metric] for key, part in scores[name][group].items()}
        known = pd.DataFrame(means).T.dropna()
        axes.errorbar(known.index, known["value"], (known["value"] - known["low"], known["high"] - known["value"]),
                      fmt=marker, capsize=3, label=name)
    axes.set(xlabel=across, ylabel=upwards, ylim=(0, 1))
axes.legend()
plt.show()

# %% [markdown]
# ## How sure the model is
#
# A generated box comes without a score, but each of its tokens has a probability. The box's confidence is the
# probability that a box begins at all, times the fourth root of the geometric mean of its digits' probabilities
# (`10_better_boxes` shows why). It ranks the boxes, which average precision needs. Is it also a probability? Then the
# points would be on the line. Above it, boxes are right more often than their confidence says. A large point stands
# for many boxes.

# %%
reliability = tuned["confidence"]["reliability"] or {"bins": []}
bins = pd.DataFrame(reliability["bins"], columns=["confidence", "right", "n"])
plt.figure(figsize=(3.6, 3.2))
plt.plot([0, 1], [0, 1], "--", color="0.6")
plt.scatter(bins["confidence"], bins["right"], 15 + 250 * bins["n"] / max(bins["n"].sum(), 1))
plt.gca().set(xlabel="confidence", ylabel="share of boxes with IoU > .5", xlim=(0, 1.05), ylim=(-0.05, 1.05))
plt.show()
print(f"AP {evaluate.with_interval(tuned['summary']['ap'])}, AP50 {evaluate.with_interval(tuned['summary']['ap50'])}")

# %% [markdown]
# **Above which confidence can one use a box without looking?** We choose the lowest confidence that gives a precision
# of 95 % on pictures of `selection`, and measure it on `val`. So the merged model first predicts boxes for `selection`.
# Read the result with its interval: the fewer boxes are left, the less is known about their precision.

# %%
made_with = chosen["parameters"]
budget = {name: made_with[name] for name in ("min_pixels", "max_pixels")}
limit = {"train": made_with["train_limit"], "selection": selection_pictures, "val": made_with["val_limit"]}
limit = {split: n for split, n in limit.items() if n}
rows = data.prepare(data.load_splits(**data.source_of(made_with), limit=limit), **budget)
model.patches_as_product()


def predicted(path, rows, prompt):
    """What the model at `path` predicts for rows, as `predictions.jsonl` has it."""
    vlm = model.load(path, dtype=torch.bfloat16, device_map=model.device_map())
    processor, file = Qwen2VLProcessor.from_pretrained(path, **budget), Path(tempfile.mkdtemp(), "predictions.jsonl")
    return predict.predict(vlm, processor, rows, prompt, file, key="", batch_size=made_with["predict_batch_size"],
                           max_new_tokens=made_with["max_new_tokens"], do_sample=False)


merged = folder.with_name(folder.name.removesuffix("-stage2") + "-merged")
shipped = merged if merged.is_dir() else folder / "model"
selected = predicted(shipped, rows["selection"], made_with["prompt"])

# %%
choice = evaluate.score(data.truth_rows(rows["selection"]), selected)["confidence"]["precision_95"]
threshold = choice["threshold"] if choice else 1.0
of_val = predictions.get("merged", predictions["fine-tuned"])
for name, least in (("all boxes", 0.0), (f"confidence ≥ {threshold:.3f}", threshold)):
    part = evaluate.score(truth, evaluate.keep_confident(of_val, least))["summary"]
    print(f"{name}: precision {evaluate.with_interval(part['precision'])} of {part['precision']['n']} boxes of val, "
          f"recall {evaluate.with_interval(part['recall'])}")

# %% [markdown]
# ## Does the zero-shot score depend on the prompt?
#
# A zero-shot score is the score of a model with a prompt. Here are one base and the same pictures with a few prompts.
# With so few pictures the intervals are wide: raise `prompt_pictures` before you conclude anything. (At 7B this takes
# too long for a notebook; there the run's own prompt is in the `base` row above.)

# %%
prompts = (made_with["prompt"], "Detect the bounding box of the nutrition-table.",
           "Where is the nutrition facts label? Answer with its bounding box.",
           "Find the table of energy, fat, carbohydrates, protein and salt.")
few = rows["val"].select(range(min(prompt_pictures, len(rows["val"]))))
for prompt in prompts if made_with["scale"] == "tiny" else ():
    zero_shot = evaluate.score(data.truth_rows(few), predicted(TINY_BASE, few, prompt))["summary"]["mean_iou"]
    print(f"{evaluate.with_interval(zero_shot)}  {prompt}")

# %% [markdown]
# ## The worst and the best twelve, and six before and after
#
# Numbers say how often the model fails, pictures say how. Truth is solid blue, the prediction dashed orange.

# %%
ranked = sorted((one for one in tuned["per_picture"] if one["iou"] is not None), key=lambda one: one["iou"])
place = {image_id: i for i, image_id in enumerate(rows["val"]["image_id"])}
for title, some in (("the worst", ranked[:12]), ("the best", ranked[:-13:-1])):
    chosen_rows = rows["val"].select([place[one["image_id"]] for one in some])
    display(plots.gallery(chosen_rows, truth, predictions["fine-tuned"], title=title))
lost = sum(not one["predicted"] for one in ranked[:12])
beside = sum(one["iou"] == 0 for one in ranked[:12]) - lost
print(f"Of the worst 12, {lost} have no box, and {beside} have one that misses the table.")

# %%
plots.before_after(rows["val"].select(range(6)), truth, predictions["base"], predictions["fine-tuned"])

# %% [markdown]
# These six were not picked; they are the first of `val`. Next: [08_deployment](08_deployment.ipynb), on a model in use.
