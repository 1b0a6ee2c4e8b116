# %% [markdown]
# # An evaluation one can trust
#
# A fine-tuned vision-language model answers in text. Whether its boxes are good, and whether one recipe is better than
# another, has to be measured, with a number that says how sure it is. This notebook takes the runs on disk apart:
# scores and what they count, intervals, paired comparisons, confidence, errors by kind, the best and the worst
# pictures. It reads files; a model is loaded only where new pictures have to be answered.
#
# Where there is no run yet, it makes a small one first (a minute on two cores). Real ones come from `make run
# RECIPE=r4-joint` or `make recipes`.

# %% tags=["parameters"]
run = None  # a run's name, such as r4-joint; None: the best one found
runs_dir = "../runs"  # where runs are
train_pictures = 160  # of the small run, where there is none
val_pictures = 60
selection_pictures = 60  # answered for the choice of a threshold
prompt_pictures = 20  # asked with every prompt

# %%
from helpers import parameters

known = {
    "run": parameters.default(parameters.text("a run's name")), "runs_dir": parameters.text("a folder of runs"),
    "train_pictures": parameters.whole(8, 10**6), "val_pictures": parameters.whole(8, 10**6),
    "selection_pictures": parameters.whole(8, 10**6), "prompt_pictures": parameters.whole(2, 10**6),
}  # fmt: skip
parameters.given(globals(), known)
parameters.check({name: globals()[name] for name in known}, known)

import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Markdown, display
from transformers import Qwen2VLProcessor

import helpers
from helpers import data, evaluate, model, plots, predict, runs
from helpers.dev import prompts
from helpers.evaluate import intervals, ledger, reports
from helpers.recipes import RECIPES

runs.quiet_libraries()
pd.options.display.max_colwidth = None
root = Path(helpers.__file__).parents[1]

# %% [markdown]
# ## The runs

# %%
found = [one for one in evaluate.find_runs(runs_dir) if "fine-tuned" in one["metrics"]["scores"]]
if not found and run is None:
    runs_dir = tempfile.mkdtemp()
    print("no scored run on disk: a small one is made. A real one: make run RECIPE=r4-joint")
    small = {"recipe": "r1-llm-only", "scale": "tiny", "train_limit": train_pictures, "val_limit": val_pictures,
             "output_root": runs_dir, "run_name": "small", "report_to": "none"}
    subprocess.run([sys.executable, root / "pipeline.py", *(f"{name}={value}" for name, value in small.items())],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = [one for one in evaluate.find_runs(runs_dir) if "fine-tuned" in one["metrics"]["scores"]]
by_name = {one["run"]: one for one in found}
if run is not None and run not in by_name:
    raise FileNotFoundError(f"no scored run {run!r} in {runs_dir}; there: {', '.join(by_name) or 'none'}. "
                            "Make it: make run RECIPE=r4-joint")


def iou_of(one):
    """A run's mean IoU with its interval."""
    return one["metrics"]["scores"]["fine-tuned"]["summary"]["mean_iou"]


chosen = by_name[run] if run else max(found, key=lambda one: iou_of(one)["value"])
peers = {one["run"]: one for one in found if one["metrics"]["truth"]["hash"] == chosen["metrics"]["truth"]["hash"]}
folder = Path(runs_dir) / f"{reports.PREFIX}{chosen['run']}"
scores, truth = chosen["metrics"]["scores"], predict.read_jsonl(folder / "truth.jsonl")
answers = {name: predict.read_jsonl(folder / reports.FILES[name]) for name in scores}
display(pd.DataFrame([{"run": name, "recipe": one["recipe"], "scale": one["scale"], "commit": one["commit"],
                       "mean IoU (95 %)": evaluate.with_interval(iou_of(one))} for name, one in peers.items()]))
display(Markdown(f"{len(peers)} of {len(found)} runs were scored on the same pictures as `{chosen['run']}`, which is "
                 f"taken apart below. Its command: `{' '.join(chosen['command'].split()[:2])} …`"))

# %% [markdown]
# ## What the numbers count
#
# A picture's IoU is the mean over its true boxes, each matched with at most one predicted box; a miss is 0. The
# constant box (the one box that suits the training pictures best) is what a model must beat to have seen anything.

# %%
display(evaluate.metrics_table(chosen["metrics"]))
tuned, constant = scores["fine-tuned"], scores["constant box"]
lift = evaluate.paired_bootstrap(tuned["per_picture"], constant["per_picture"])
above, below = lift["difference"]["low"] > 0, lift["difference"]["high"] < 0
worth = "better than" if above else "worse than" if below else "not to be told from"
display(Markdown(f"Fine-tuned minus constant box, picture by picture: {evaluate.with_interval(lift['difference'])} "
                 f"mean IoU: {worth} a box that never looks at the picture."))

# %% [markdown]
# Several tables on one picture: boxes and truth are matched one to one for the greatest sum of IoU, whatever their
# order. A box that is left over is surplus and costs precision; a true box that is left over counts as 0.

# %%
several = max(tuned["per_picture"], key=lambda record: (len(record["true"]), len(record["predicted"])))
display(pd.DataFrame({"true box (x first)": [[round(x, 2) for x in box] for box in several["true"]],
                      "IoU of its partner": several["box_ious"], "found (IoU > .5)": several["box_found"]}))
display(Markdown(f"`{several['image_id']}`: {len(several['true'])} true, {len(several['predicted'])} predicted, "
                 f"{several['surplus']} surplus; the picture counts as {several['iou']:.3f}."))

# %% [markdown]
# **Bad input** must not flatter. The predictions are spoiled on purpose: one is missing, one stands twice, one is for
# an unknown picture, one has a confidence that is no number, one a box without area.

# %%
spoiled = [dict(line) for line in answers["fine-tuned"]]
with_box = [line for line in spoiled[3:] if line["boxes"]]
with_box[0]["confidences"] = [float("nan")] * len(with_box[0]["boxes"])
with_box[1]["boxes"] = [[0.2, 0.2, 0.2, 0.6]] * len(with_box[1]["boxes"])
spoiled = [*spoiled[1:], dict(spoiled[1]), {**spoiled[0], "image_id": "stranger"}]
named = evaluate.score(truth, spoiled, resamples=0)
display(pd.Series({kind: ", ".join(ids) for kind, ids in named["problems"].items()}, name="named").to_frame())
display(Markdown(f"All is named, and n stays {named['summary']['mean_iou']['n']} (it was "
                 f"{tuned['summary']['mean_iou']['n']}): what is missing or broken counts as 0, not as absent."))

# %% [markdown]
# ## How sure a mean is
#
# A bootstrap over pictures gives the interval: with other pictures of the same kind the mean could as well have been
# anywhere in it.

# %%
sizes = [n for n in (12, 25, 50) if n < len(truth)] + [len(truth)]
widths = {n: intervals.interval(intervals.mean, [r["iou"] for r in tuned["per_picture"][:n] if r["iou"] is not None])
          for n in sizes}
display(pd.DataFrame({f"first {n}": {"mean IoU (95 %)": evaluate.with_interval(one), "half width": round(
    (one["high"] - one["low"]) / 2, 3)} for n, one in widths.items()}).T)
fifty = ledger.what_fifty_tell(ledger.collect(runs_dir), chosen["scale"])
display(Markdown(fifty or "With two recipes on disk it would say here what 50 pictures can tell: `make recipes`."))

# %% [markdown]
# ## Two runs on the same pictures
#
# Some pictures are hard for everyone. Compared in pairs that part cancels, so differences can be seen that two separate
# intervals would hide. The same from the command line: `make compare A=r4-joint B=r1-llm-only`.
#
# Pictures are one source of chance, the seed of a training is the other. Runs named `r4-joint-s1`, `r4-joint-s2`
# (`-p seed 1 -p run_name r4-joint-s1`) are further seeds of `r4-joint`: their interval draws seeds and pictures anew.

# %%
rivals = {f"{chosen['run']}: {name}": scored for name, scored in scores.items() if name != "fine-tuned"}
rivals |= {name: one["metrics"]["scores"]["fine-tuned"] for name, one in peers.items() if one is not chosen}
pairs = {name: evaluate.paired_bootstrap(tuned["per_picture"], other["per_picture"]) for name, other in rivals.items()}
display(pd.DataFrame({name: {
    f"{chosen['run']} minus it": evaluate.with_interval(pair["difference"]), "verdict": pair["verdict"],
    "50 pictures would tell": f"{100 * pair['power_50']:.0f} %", "pictures needed": pair["pictures_needed"],
} for name, pair in pairs.items()}).T)  # fmt: skip
open_cases = [name for name, pair in pairs.items() if "cannot" in pair["verdict"]]
display(Markdown(f"{len(pairs) - len(open_cases)} of {len(pairs)} comparisons are decided by these pictures" + (
    f"; not decided: {', '.join(open_cases)}." if open_cases else ".")))

groups = {name: group for name, group in evaluate.group_seeds(found).items() if len(group) > 1}
for name, group in groups.items():
    mean = evaluate.over_seeds(evaluate.iou_matrix(group)[0])
    display(Markdown(f"`{name}`, {len(group)} seeds: {evaluate.with_interval(mean)}; each alone: "
                     + ", ".join(evaluate.with_interval(iou_of(one)) for one in group)))
if not groups:
    display(Markdown("No recipe has several seeds here. This makes one more: `make run RECIPE=r4-joint "
                     "ARGS='-p seed 1 -p run_name r4-joint-s1'`."))

# %% [markdown]
# ## Where the IoU lies
#
# A mean hides its shape. First the pictures by IoU, and the share that reaches at least so much. Then errors by size
# and by rotation, each point with its interval: a group of few pictures can say little, and the width shows it.

# %%
others = {name: predict.read_jsonl(Path(runs_dir) / f"{reports.PREFIX}{name}" / reports.FILES["fine-tuned"])
          for name, one in peers.items() if one is not chosen}
curves = {name: answers[name] for name in ("constant box", "base") if name in answers}
curves |= {f"{chosen['run']}": answers["fine-tuned"]} | dict(list(others.items())[:3])
display(plots.iou_curves(curves, truth))
share = {name: scores[name]["summary"]["iou_over_50"]["value"] for name in ("constant box", "fine-tuned")}
display(Markdown(f"An IoU above .5 is reached on {100 * share['fine-tuned']:.0f} % of the pictures; the constant box "
                 f"reaches it on {100 * share['constant box']:.0f} %."))
shown = {"constant box": constant, "base": scores.get("base", constant), chosen["run"]: tuned}
display(plots.errors_by(shown, "by_size"), plots.errors_by(shown, "by_rotation"))
sure = {name: group["mean_iou_boxes"] for name, group in tuned["by_size"].items() if group["mean_iou_boxes"]["n"] > 1}
low, high = (pick(sure, key=lambda name: sure[name]["value"]) for pick in (min, max))
apart = sure[low]["high"] < sure[high]["low"]
display(Markdown(f"Tables of {low} of the picture score lowest ({evaluate.with_interval(sure[low])}), those of {high} "
                 f"highest ({evaluate.with_interval(sure[high])}): the intervals "
                 f"{'do not overlap' if apart else 'overlap'}."))

# %% [markdown]
# ## How sure the model is
#
# A generated box comes without a score, but each of its digits has a probability. Their geometric mean is the box's
# confidence. It ranks the boxes, which is what average precision needs, and it can be held against the share of boxes
# that are right.

# %%
confidence, ap = tuned["confidence"], tuned["summary"]
if confidence["reliability"]:
    display(plots.reliability_diagram(confidence["reliability"]))
    unranked = evaluate.score(truth, [line | {"confidences": []} for line in answers["fine-tuned"]])["summary"]["ap50"]
    gap = sum(group["n"] * (group["confidence"] - group["right"]) for group in confidence["reliability"]["bins"])
    display(Markdown(
        f"AP50 is {evaluate.with_interval(ap['ap50'])} ranked by confidence and {evaluate.with_interval(unranked)} "
        f"without (AP {evaluate.with_interval(ap['ap'])}, AP75 {evaluate.with_interval(ap['ap75'])}). Confidence and "
        f"share of right boxes lie {confidence['reliability']['ece']:.2f} apart on average; on the whole the model is "
        f"{'less' if gap < 0 else 'more'} sure than right. It is a rank, not a probability: hence the threshold."))
else:
    display(Markdown("No box was predicted with a confidence, so there is nothing to rank."))

# %% [markdown]
# **A threshold to use boxes unseen.** Which confidence gives a precision of 95 %? That is a choice, so it is made on
# pictures of `selection`, and then measured on `val`. The shipped model answers them now.

# %%
made_with = runs.read_json(folder / "manifest.json")["parameters"]
budget = {name: made_with[name] for name in ("min_pixels", "max_pixels")}
limit = {"train": made_with["train_limit"], "selection": selection_pictures, "val": made_with["val_limit"]}
raw = data.load_raw(made_with["dataset_id"], revision=made_with["dataset_revision"],
                    limit={split: n for split, n in limit.items() if n})
rows = data.prepare(data.clean(raw, data.audit(raw)), **budget)
short = folder.name.removesuffix("-stage2")
shipped = next(path for path in (folder.with_name(f"{short}-merged"), folder / "model") if path.is_dir())
val_answers = answers.get("merged", answers["fine-tuned"])

# %%
model.patches_as_product()
vlm = model.load(shipped, dtype=torch.bfloat16, attn_implementation=model.attention(training=False),
                 device_map=model.device_map())
processor = Qwen2VLProcessor.from_pretrained(shipped, **budget)
selection_answers = predict.predict(
    vlm, processor, rows["selection"], made_with["prompt"], Path(tempfile.mkdtemp()) / "selection.jsonl",
    key="selection", batch_size=made_with["predict_batch_size"], max_new_tokens=made_with["max_new_tokens"],
    do_sample=False)
del vlm
trusted = evaluate.trusted_boxes((data.truth_rows(rows["selection"]), selection_answers), (truth, val_answers))
display(evaluate.trusted_table(trusted))
said = f"No confidence makes the boxes of {len(rows['selection'])} pictures of selection 95 % right: use none unseen."
if trusted["threshold"] is not None:
    kept = trusted["selection"]["kept"]
    said = (f"Boxes that pass: {kept} on the {len(rows['selection'])} pictures of selection that chose the threshold"
            f"{' (so few that the choice is mostly chance)' if kept < 20 else ''}, on val "
            f"{trusted['kept']['precision']['n']} of {trusted['all']['precision']['n']}, there with a precision of "
            f"{evaluate.with_interval(trusted['kept']['precision'])}.")
display(Markdown(said))

# %% [markdown]
# ## The zero-shot score is a question of the prompt
#
# "The base model scores so much" means nothing without the prompt, and little without the precision. The same base,
# the same pictures, some prompts, in NF4 and in bf16; `make prompts` asks all of `val`.

# %%
if made_with["scale"] == "tiny":
    few = rows["val"].select(range(min(prompt_pictures, len(rows["val"]))))
    asked = prompts.measure(few, Path(runs_dir) / "prompts", scale=made_with["scale"])
else:  # a large base is asked by its own command
    asked = runs.read_json(Path(runs_dir) / "prompts" / "prompts.json") or []
    print("" if asked else f"not asked yet: make prompts ARGS='--scale {made_with['scale']}'")
if asked:
    display(prompts.table_of(asked))
    value = [row["mean_iou"]["value"] for row in asked]
    told = [row for row in asked if row["to_first"]["low"] > 0 or row["to_first"]["high"] < 0]
    display(Markdown(f"From {min(value):.3f} to {max(value):.3f} for one base model on {asked[0]['mean_iou']['n']} "
                     f"pictures; {len(told)} of {len(asked)} rows differ from the first prompt by more than chance."))

# %% [markdown]
# Each recipe stands beside the base as it was held before training: r2 and r3 beside the one in bf16.

# %%
held = {name: RECIPES[one["recipe"]][0].precision for name, one in peers.items()}
held |= {name: one["parameters"]["precision"] for name, one in peers.items()
         if one["parameters"]["precision"] and RECIPES[one["recipe"]][0].trains == "lora"}
gains = {name: evaluate.paired_bootstrap(*(one["metrics"]["scores"][which]["per_picture"] for which in
                                           ("fine-tuned", "base")))["difference"]
         for name, one in peers.items() if "base" in one["metrics"]["scores"]}
pd.DataFrame([{"run": name, "baseline held in": held[name],
               "fine-tuned minus its baseline": evaluate.with_interval(gain)} for name, gain in gains.items()])

# %% [markdown]
# ## What the loss looks at
#
# Loss on the answer alone, or on all text with the question in it? Three seeds each, the same pictures, paired. That is
# an hour of training, so it has a command of its own, `make collators`, which keeps its result in `results.json`.

# %%
both = runs.read_json(root / "results.json").get("collators")
if both:
    display(pd.DataFrame([{"loss on": name, "seeds": both["seeds"],
                           "mean IoU (95 %)": evaluate.with_interval(both[name])}
                          for name in ("assistant", "all-text")]))
display(Markdown(f"Answer alone minus all text: {evaluate.with_interval(both['difference'])}, {both['verdict']}."
                 if both else "Not measured yet: `make collators`."))

# %% [markdown]
# ## The worst twelve, the best twelve, and six before and after
#
# Numbers say how often, pictures say how. Truth is solid blue, the prediction dashed orange.

# %%
display(plots.worst(rows["val"], truth, answers["fine-tuned"]))
lost = sorted((r for r in tuned["per_picture"] if r["iou"] is not None), key=lambda r: r["iou"])[:12]
display(Markdown(f"Of the worst {len(lost)}, {sum(not r['predicted'] for r in lost)} have no box at all, "
                 f"{sum(bool(r['predicted']) and r['iou'] == 0 for r in lost)} a box beside the table, and "
                 f"{sum(r['rotation'] not in (0, None) for r in lost)} lie turned."))
display(plots.best(rows["val"], truth, answers["fine-tuned"]))
display(plots.before_after(rows["val"].select(range(min(6, len(rows["val"])))), truth, answers["base"],
                           answers["fine-tuned"]))
gain = evaluate.paired_bootstrap(tuned["per_picture"], scores["base"]["per_picture"])["difference"]
display(Markdown(f"The same six pictures, not chosen. On all {gain['n']} pictures training changed mean IoU by "
                 f"{evaluate.with_interval(gain)}."))
