# %% [markdown]
# # The data set: what can be learned from it, and what can be measured with it?
#
# A model that draws boxes is no better than the boxes that it learns from, and its score is no better than the pictures
# that it is scored on. So we look at both before any training:
#
# * What is a row, and what is wrong with some of them?
# * How large are the tables, and where do they lie? What does one score without looking?
# * What does an IoU of .5, .7 or .9 look like?
# * How many pictures does it take to say that one recipe is better than another?
#
# By default the notebook reads the *embedded scenes*: packaging that this project renders, with the schema, the split
# sizes and the faults of the real data set. `scale = "7b"` reads `openfoodfacts/nutrition-table-detection` from the
# Hub, `dataset_id` a folder of your own.

# %% tags=["parameters"]
scale = "tiny"  # tiny: the embedded scenes; 7b: the Hub's data set
dataset_id = None  # Hub id, local folder or file, or embedded; None: the scale's own
dataset_revision = None  # commit, branch or tag on the Hub
train_limit = None  # use only the first so many pictures
val_limit = None
seed = 0  # which scenes are rendered, and every draw below

# %%
from helpers.topics.opening import opening

opening(globals(), "dataset_id", "dataset_revision", "train_limit", "val_limit", "seed", scale=("tiny", "7b"))

import datasets
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib import pyplot as plt
from scipy import stats

from helpers import boxes, data, evaluate, plots
from helpers.data.pictures import open_picture
from helpers.topics.dataset import box_table, plant_each

rng = np.random.default_rng(seed)

# %% [markdown]
# ## A row
#
# A row is one photo with its boxes. A box is `[y_min, x_min, y_max, x_max]`, in shares of the picture's height and
# width, from the top left. Whatever the source, a row has these fields:

# %%
limit = {split: n for split, n in {"train": train_limit, "val": val_limit}.items() if n}
raw = data.load_raw(dataset_id, revision=dataset_revision, seed=seed, limit=limit)
raw["val"][0]

# %% [markdown]
# ## What is wrong with the rows
#
# The audit decodes every picture once and checks every box against its rules. Each fault has a name and an action;
# nothing is dropped in silence. The first table lists the rules that found something, and the pictures show one or two
# cases of each (a cross is a box without area). The last table is what remains: `train` to learn from, `selection` to
# choose between models, `val` for the one report at the end. Two photos of one pack are nearly the same picture, so no
# barcode is in two splits.

# %%
audit = data.audit(raw)
rows = data.clean(raw, audit)
truth = {split: data.truth_rows(rows[split]) for split in rows}
display(audit.table().drop(columns="ids").style.hide(), plots.audit_sheet(raw, audit, each=2), audit.statistics)

# %% [markdown]
# Can the audit be trusted? We take one good row, make a copy of it for each rule with just that fault, and see whether
# the audit finds it.

# %%
sound = rows["val"].cast_column("image", datasets.Image(decode=False))[0]
broken, planted = plant_each(sound)
findings = {(fault.fault, fault.split, fault.index) for fault in data.audit(broken).faults}
trial = pd.DataFrame(planted)[["fault", "done"]].assign(found=[fault[:3] in findings for fault in planted])
display(trial.style.hide())
print(f"{trial['found'].sum()} of {len(trial)} planted faults are found, by {len(data.RULES)} rules.")

# %% [markdown]
# One fault deserves a picture. A phone stores a photo as the sensor recorded it, with an EXIF tag that says how to turn
# it. A viewer follows the tag; code that ignores it puts the box somewhere else. Boxes here belong to the picture *as
# shown*.

# %%
for fault in [fault for fault in audit.faults if fault.fault == "exif-as-shown"][:1]:
    row = raw[fault.split][fault.index]
    stored = raw[fault.split].cast_column("image", datasets.Image(decode=False))[fault.index]["image"]
    box = boxes.yxyx_unit_to_xyxy_unit(row["objects"]["bbox"])
    display(plots.panels([("EXIF ignored", open_picture(stored), box, []), ("EXIF obeyed", row["image"], box, [])]))

# %% [markdown]
# ## The pictures
#
# The first six of `train` and of `val` with the boxes as they are trained on. Is each on its table? (`make data
# DATASET=folder` shows more.) Then look for what makes the task hard: tables that fill the picture and tables that
# take a few per cent of it, packs on their side, cans that bend the table, lists and barcodes that look like one.

# %%
first = [row for split in ("train", "val") for row in rows[split].select(range(min(6, len(rows[split]))))]
display(plots.gallery(first, truth["train"] + truth["val"]))
every = pd.DataFrame(sum(truth.values(), []))
mega, upright = every["width"] * every["height"] / 1e6, (every["height"] > every["width"]).mean()
print(f"{len(every)} pictures of {mega.min():.2f} to {mega.max():.2f} megapixels; {upright:.0%} stand upright.")

# %% [markdown]
# ## The boxes
#
# The default data set has four classes, which are kinds of one thing. The prompt says "the nutrition table", and the
# model may name any of them; only the place of the box counts for the score.

# %%
table = box_table(truth)
medians = table.groupby("class")[["area", "width px", "height px"]].median().add_prefix("median ").round(2)
display(medians.assign(boxes=table["class"].value_counts()))
share = table["class"].value_counts(normalize=True)
print(f"{share.max():.0%} of the boxes are {share.idxmax()}: a mean over all boxes is mostly about these.")

# %% [markdown]
# Do real tables have these sizes? The circles are quantiles (5, 25, 50, 75, 95 %) of the 130 true boxes of the real
# `val`, from raw outputs that another project published; the line is what is loaded here. With five quantiles alone the
# test below is a rough one.

# %%
shares = [0.05, 0.25, 0.5, 0.75, 0.95]
real = {"width": (0.129, 0.344, 0.508, 0.767, 0.990), "height": (0.077, 0.245, 0.402, 0.581, 0.996),
        "area": (0.022, 0.089, 0.199, 0.362, 0.961), "width / height": (0.573, 0.927, 1.260, 1.802, 4.608)}  # fmt: skip
figure, grid = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True)
for axes, (name, quantiles) in zip(grid, real.items(), strict=True):
    axes.ecdf(table[name], label=f"here, {len(table)} boxes")
    axes.plot(quantiles, shares, "o", markerfacecolor="white", label="real val, 130 boxes")
    axes.set(xlabel=name, ylim=(0, 1.02), xlim=(0, 5 if name == "width / height" else 1.02))
grid[0].set_ylabel("share of boxes below")
grid[3].legend()
plt.show()
gap = max(abs((table[name] <= value).mean() - share)
          for name, quantiles in real.items() for value, share in zip(quantiles, shares, strict=True))
chance = 1.36 * np.sqrt(1 / 130 + 1 / len(table))
print(f"The widest gap is {gap:.2f}. Two samples of one population stay within {chance:.2f} in 95 of 100 draws "
      f"(Kolmogorov and Smirnov): the sizes {'do not differ' if gap <= chance else 'differ'} significantly.")

# %% [markdown]
# ## Where the boxes are, and what a blind guess scores
#
# The map shows the share of boxes that cover each point. The dashed box is the best *constant* prediction: the one box
# that has the highest mean IoU on `train` if it is given for every picture.

# %%
constant = evaluate.best_constant_box(truth["train"] or truth["val"])
places = (np.arange(100) + 0.5) / 100
across, down = ((table[[low]].to_numpy() <= places) & (places < table[[high]].to_numpy())
                for low, high in (("x0", "x1"), ("y0", "y1")))  # [boxes, 100] each
covered = down.T.astype(float) @ across / len(table)
figure, axes = plt.subplots(figsize=(3.6, 3))
figure.colorbar(axes.imshow(covered, extent=(0, 1, 1, 0), cmap="cividis", zorder=1), label="share of boxes")
axes.add_patch(plt.Rectangle(constant[:2], *(constant[2:] - constant[:2]), fill=False, edgecolor="white", ls="--"))
axes.set(xlabel="x, share of width", ylabel="y, share of height")
plots.finish(figure)

# %%
blind = evaluate.score(truth["val"], evaluate.constant_predictions(constant, truth["val"]))["summary"]["mean_iou"]
print(f"One point is covered by {covered.max():.0%} of the boxes, and the constant box scores a mean IoU of "
      f"{evaluate.with_interval(blind)} on val.\nOnly what a model scores above that shows that it uses the picture.")

# %% [markdown]
# ## What an IoU looks like
#
# IoU is intersection over union. Here is one true box with boxes that miss it by just so much that the IoU is .5, .7 or
# .9. How far off that is can be computed by hand:
#
# * **shifted** sideways by a share $d$ of the box's width: $\mathrm{IoU} = \frac{1 - d}{1 + d}$, so
#   $d = \frac{1 - \mathrm{IoU}}{1 + \mathrm{IoU}}$
# * **too small** or **too large**, both sides times $s$ around the middle: $\mathrm{IoU} = s^2$ or $1 / s^2$

# %%
xyxy = table[["x0", "y0", "x1", "y1"]]
example = table.loc[(xyxy - [0.3, 0.35, 0.7, 0.65]).abs().sum(axis=1).idxmin()]  # a box near the middle
photo = next(row["image"] for row in rows[example["split"]] if row["image_id"] == example["image_id"])
true = example[xyxy.columns].to_numpy(float)
middle, wrong, levels = np.tile((true[:2] + true[2:]) / 2, 2), {}, (0.5, 0.7, 0.9)
for iou in levels:
    wrong["shifted", iou] = true - np.array([1, 0, 1, 0]) * example["width"] * (1 - iou) / (1 + iou)
    wrong["too small", iou] = middle + (true - middle) * iou**0.5
    wrong["too large", iou] = middle + (true - middle) / iou**0.5
measured = {key: boxes.pairwise_iou([true], [box])[0, 0] for key, box in wrong.items()}
display(plots.panels([(f"{key[0]}: IoU {measured[key]:.3f}", photo, [true], [wrong[key]]) for key in sorted(wrong)],
                     columns=3, names=("truth", "prediction")))
print(f"By hand and measured differ by {max(abs(measured[key] - key[1]) for key in wrong):.0e} at most.")

# %% [markdown]
# At .5 a third of the table is missed (shifted) or half of it (too small), and yet it counts as found. At .7 a shifted
# box still cuts off about a sixth. At .9 the difference is hard to see. How many pixels that is depends on the table's
# size:

# %%
sides = table[["width px", "height px"]].min(axis=1).quantile([0.05, 0.5, 0.95])
allowed = pd.DataFrame({f"shift at IoU {iou}, px": sides * (1 - iou) / (1 + iou) for iou in levels})
allowed.insert(0, "shorter side, px", sides)
display(allowed.set_axis(["small (5 % are smaller)", "median", "large (5 % are larger)"]).round(1))
print(f"On a small table a shift of {allowed.iloc[0, -1]:.1f} px brings the IoU down to .9. Whether that is the "
      "model's error or the annotator's, no score can say.")

# %% [markdown]
# ## How many pictures does it take?
#
# A mean over $n$ pictures is known up to its 95 % interval, $\pm 1.96\, \sigma / \sqrt{n}$. For fine-tuned 7B models,
# another project published a standard deviation of a picture's IoU of about $\sigma = .21$, and means of four recipes
# from .833 to .864 on the first 50 pictures of `val`.

# %%
spread, worst, best = 0.21, 0.833, 0.864
half = pd.Series({n: 1.96 * spread / np.sqrt(n) for n in (50, 123, 500, 2000)}, name="±").rename_axis("pictures")
display(half.round(3).to_frame().T)
print(f"From 50 pictures a mean is known to ± {half[50]:.3f}; the four means lie within {best - worst:.3f}.")

# %% [markdown]
# It is better to compare two recipes **on the same pictures**: a hard picture is hard for both, so the difference of
# their IoUs varies less. With a correlation $\rho$ its standard deviation is $\sigma_d = \sigma\sqrt{2(1 - \rho)}$.
# *Power* is how often an experiment with $n$ pictures finds a difference $\delta$ that is really there:
#
# $$\mathrm{power} \approx \Phi \left( \frac{\delta \sqrt{n}}{\sigma_d} - 1.96 \right) \qquad
# n_{80} = \left( \frac{(1.96 + 0.84)\, \sigma_d}{\delta} \right)^2$$
#
# The lines are this formula. Each point is 1000 simulated experiments: IoUs between 0 and 1 (beta distributed) with the
# published standard deviation and means, and a paired t-test at 95 %.

# %%
def power(difference, sigma, pictures):
    """How often so many pictures find a difference that spreads by sigma from picture to picture."""
    return stats.norm.cdf(difference * np.sqrt(pictures) / sigma - 1.96)


means, n, counts = np.array([worst, best]), np.geomspace(10, 5000, 60), [20, 50, 123, 300, 1000]
a, b = (part * (means * (1 - means) / spread**2 - 1) for part in (means, 1 - means))  # of the beta distribution
for likeness in (0, 0.7, 0.9):
    normal = rng.multivariate_normal([0, 0], [[1, likeness], [likeness, 1]], 100_000)
    ious = stats.beta.ppf(stats.norm.cdf(normal), a, b)  # [pictures, 2 recipes]
    difference, rho = ious[:, 1] - ious[:, 0], np.corrcoef(ious.T)[0, 1]
    (line,) = plt.semilogx(n, power(best - worst, spread * np.sqrt(2 * (1 - rho)), n), label=f"ρ = {abs(rho):.2f}")
    told = [stats.ttest_1samp(rng.choice(difference, (1000, k)), 0, axis=1).pvalue < 0.05 for k in counts]
    plt.plot(counts, [found.mean() for found in told], "o", color=line.get_color())
plt.gca().set(xlabel="pictures", ylabel=f"share that finds δ = {best - worst:.3f}")
plt.legend()
plt.show()

# %%
rhos, differences = (0, 0.6, 0.8, 0.9), (0.01, 0.02, best - worst, 0.05, 0.1)
needed = [[(2.8 * spread * np.sqrt(2 * (1 - rho)) / d) ** 2 for rho in rhos] for d in differences]
display(pd.DataFrame(needed, [f"δ = {d:.3f}" for d in differences], [f"ρ = {rho}" for rho in rhos]).round().astype(int))
sigma = spread * np.sqrt(2 * (1 - 0.6))  # two models of another project have ρ = .64 on the real val
print(f"With ρ = .6, 50 pictures find the published difference in {power(best - worst, sigma, 50):.0%} of experiments, "
      f"123 in {power(best - worst, sigma, 123):.0%}.\nOn all of val a difference has to be "
      f"{2.8 * sigma / np.sqrt(123):.3f} to be found four times in five.")

# %% [markdown]
# That is why this project scores all of `val`, compares recipes picture by picture, and gives every mean IoU with its
# interval.
# Next: [03_data_preprocessing](03_data_preprocessing.ipynb), on what happens to a row before training.
