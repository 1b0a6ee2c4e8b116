# %% [markdown]
# # Better boxes: the second table, and none
#
# A fine-tuned model draws a good box round one table. But most photos that people take show exactly one, and so it
# draws one box whatever it is shown: the second table is left out, and a photo without a table gets a box too. This
# notebook shows why, what helps and what it costs, and what did not help.
#
# 1. Why the model stops after one box
# 2. Training on pictures made by pasting
# 3. Looking again
# 4. What that brings
# 5. Rewards, adapters and other settings
# 6. How sure a box is
# 7. What to switch on
#
# The pictures are drawn here. The trainings took longer, and their scores stand in `study_tiny.json`. Two splits that
# no training used measure what `val` has too few of: `val-multi`, pictures with two to four tables, and `val-none`,
# pictures without one, half of them with a table of another kind.

# %% tags=["parameters"]
pictures = 24  # of train, to paste from
seed = 0

# %%
from helpers.topics.opening import opening

opening(globals(), "seed", pictures=range(8, 1084))

# %%
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib import pyplot as plt

from helpers import data, plots
from helpers.data.paste import with_pasted
from helpers.data.pictures import painted_over
from helpers.topics.training import rows_and_processor

# %%
study = json.loads(Path("study_tiny.json").read_text())
variants = study["variants"]
plain, best, more = (variants[name] for name in ("r1", "r1, pasted", "r1, more pasted"))
machines = sorted({row["machine"] for row in variants.values()})
Markdown(f"""`{study["command"]}`, commit {study["commit"]}, {study["date"]}, on {"; ".join(machines)}; {plain["seeds"]}
seeds each. Pictures: {", ".join(f"{n} of {split}" for split, n in study["pictures"].items())}. Intervals are 95 %, over
seeds and pictures; differences are taken on the same pictures and seeds.""")

# %% [markdown]
# ## 1 · Why the model stops after one box
#
# At two places of a completion the model decides how many boxes there are. Its first token begins a box or denies that
# there is a table; the token behind a box begins another or ends the text. The figure shows the probability that a box
# begins there. Above: r1 as the pipeline trains it. Below: r1 that trained on pasted pictures too.

# %%
places = {"table": ("first token", "val-none", "val"), "another": ("after the first box", "val", "val-multi")}
shown = {name: row for name, row in variants.items() if "decisions" in row}
figure, grid = plt.subplots(len(shown), 2, figsize=(8, 2.1 * len(shown)), sharex=True, squeeze=False)
for line, (name, row) in zip(grid, shown.items(), strict=True):
    for axes, (decision, (where, *splits)) in zip(line, places.items(), strict=True):
        for split in splits:
            label = "val, one table" if (split, decision) == ("val", "another") else split
            axes.hist(row["decisions"][decision][split], np.linspace(0, 1, 21), alpha=0.6, label=label)
        axes.set(title=f"{name}: {where}", ylabel="pictures")
        axes.legend()
figure.supxlabel("probability that a box begins")
plots.finish(figure)

# %%
def ranked(row, decision):
    """How often a picture that should get a (further) box has the higher probability, of all pairs."""
    low, high = (np.array(row["decisions"][decision][split]) for split in places[decision][1:])
    return (high[:, None] > low).mean()


Markdown("\n".join(f"""* **{name}**: a picture with a table gets a higher probability at the first token than one
  without in {ranked(row, "table"):.0%} of all pairs, one with a second table after the first box in
  {ranked(row, "another"):.0%}.""" for name, row in shown.items()))

# %% [markdown]
# So the plain model does not merely set its limits wrong. Its probabilities for the two cases overlap (a coin would
# reach 50 %), and a bias on those tokens could not mend that. It has to learn what a second table is, and what none is.
#
# ## 2 · Training on pictures made by pasting
#
# Each made picture begins as a training picture. Either tables cut out of others are pasted in, and the boxes are known
# because we put them there ([Copy-Paste](https://arxiv.org/abs/2012.07177)). Or every table is taken away: covered with
# a piece that shows none, or painted over. Pieces without a table are pasted too, and one of several tables is painted
# over now and then, so that neither an edge nor a plain spot says what is in the picture. A piece may hang over the
# picture's edge. Four real pictures, and behind them what was made of pictures like them:

# %%
rows, _ = rows_and_processor(train=pictures, selection=1, val=1)
pasted = with_pasted(rows["train"], 1, seed)
few = pasted.select([*range(4), *range(pictures, pictures + 8)])
plots.gallery(few, data.truth_rows(few), title="Four training pictures, then eight made from pieces of them")

# %% [markdown]
# They look like collages, and no photographer would take them. But they show any number of tables, at any place.
#
# ## 3 · Looking again
#
# The other way changes no weight. A model that names one table and stops finds the next where the first one is *gone*.
# So `passes` paints the boxes found over with the picture's mean colour and runs inference again, until nothing new is
# found: [adversarial erasing](https://arxiv.org/abs/1703.08448), at inference. Here the boxes are the true ones, to
# show what each pass gets to see:

# %%
several = max(data.load_extra()["val-multi"].select(range(8)), key=lambda row: len(row["objects"]["bbox"]))
boxes = [[x0, y0, x1, y1] for y0, x0, y1, x1 in several["objects"]["bbox"]]
figure, grid = plt.subplots(1, len(boxes) + 1, figsize=(11, 4))
for count, axes in enumerate(grid):
    axes.imshow(painted_over(several["image"], boxes[:count]))
    axes.set(title=f"pass {count + 1}", xticks=[], yticks=[])
plots.finish(figure)

# %% [markdown]
# It ends only if the model can say that there is no table (any more). The plain recipes never learned that, so for them
# `passes` draws boxes without end, the true ones and then others. It belongs to training on pasted pictures: some show
# what a pass gets to see, with tables painted over.
#
# A model that draws many boxes draws some of them twice. So of boxes with an IoU above .5 `predict` keeps the first, as
# the non-maximum suppression of many detectors keeps the best.
#
# ## 4 · What that brings
#
# The bars are 95 % intervals; a filled dot is one pass, an open one up to four. On `val-none` less is better.

# %%
measures = {"val": "val: mean IoU", "val-multi": "val-multi: mean IoU of boxes", "val-none": "val-none: false alarms"}
main = {name: row for name, row in variants.items() if "passes" in row}
figure, grid = plt.subplots(1, 3, figsize=(11, 0.5 * len(main) + 1), sharey=True)
for axes, (measure, title) in zip(grid, measures.items(), strict=True):
    for place, (name, row) in enumerate(main.items()):
        for shift, scores, filled in ((-0.13, row["scores"], "full"), (0.13, row["passes"], "none")):
            score, colour = scores[measure], plots.COLOURS[["r1", "r4", "r5"].index(name[:2])]
            axes.plot(score["value"], place + shift, "o", color=colour, fillstyle=filled)
            axes.plot([score["low"], score["high"]], [place + shift] * 2, color=colour)
    axes.set(title=title, xlim=(0, 1.03))
grid[0].set_yticks(range(len(main)), main)
grid[0].invert_yaxis()
plots.finish(figure)

# %% [markdown]
# The same as numbers, one line for one pass and one for up to four. `surplus` is the share of pictures of `val` that
# get a box too many, and `F1` counts them too; differences are to the plain recipe with one pass, with a `*` where the
# interval does not contain 0. *Pasted* has three made pictures to two real ones, *more pasted* four to each, both for
# three epochs. Updates of r5 are those by rewards (section 5), after r1's.

# %%
def signed(found):
    """A difference with its interval, and a star where that does not contain 0."""
    text = f"{found['value']:+z.3f} ({found['low']:+z.3f} to {found['high']:+z.3f})"
    return text + " *" if found["low"] > 0 or found["high"] < 0 else text


lines, ways = {}, ((1, "scores", "f1", "minus_plain"), (4, "passes", "passes_f1", "passes_minus_plain"))
for name, row in main.items():
    for passes, scores, f1, minus in ways:
        lines[name, passes] = {"seeds": row["seeds"], "updates": row["updates"], "F1": f"{row[f1]:.3f}"}
        lines[name, passes] |= {m: f"{row[scores][m]['value']:.3f}" for m in (*measures, "val surplus")}
        lines[name, passes] |= {f"{m} − plain": signed(row[minus][m]) if minus in row else "" for m in measures}
pd.DataFrame(lines).T.rename_axis(["", "passes"])

# %%
before, once, often = ({m: one["value"] for m, one in row.items()}
                       for row in (plain["scores"], best["scores"], best["passes"]))
Markdown(f"""For r1, pasted pictures take `val-multi` from {before["val-multi"]:.2f} to **{once["val-multi"]:.2f}**, and
further passes to **{often["val-multi"]:.2f}**; *more pasted* ends at {more["passes"]["val-multi"]["value"]:.2f}. False
alarms fall from {before["val-none"]:.0%} to **{once["val-none"]:.0%}**. The price is boxes too many on `val`: in
{once["val surplus"]:.0%} of its pictures, and in {often["val surplus"]:.0%} with further passes, against
{before["val surplus"]:.0%}.""")

# %% [markdown]
# Which tables of `val-multi` are still missed? The small ones. Here are its boxes in four quarters by size. Size is
# given in image tokens, of which the tiny model has 144 for a whole picture. At 7B it is up to 1280.

# %%
quarters = [f"{low:.0f}–{high:.0f}" for low, high in itertools.pairwise(144 * np.array(plain["by_size"]["edges"]))]
sizes = {"r1, 1 pass": plain["by_size"]["iou"][0]} | {f"{name}, 4 passes": variants[name]["by_size"]["iou"][1]
                                                       for name in ("r1", "r1, pasted", "r1, more pasted")}
axes = pd.DataFrame(sizes, index=quarters).plot(marker="o", figsize=(8, 3), ylim=(0, 1), color=plots.COLOURS[:4])
axes.set(xlabel="size of the table, in image tokens", ylabel="mean IoU")
plots.finish(axes.figure)

# %% [markdown]
# ## 5 · Rewards, adapters and other settings
#
# `r5` goes on from r1 with GRPO on the IoU of whole completions, their number of boxes and their form
# (`pipeline.ipynb`, section 7). What do its 100 steps change? Each line is r5 minus the r1 that it began from, on the
# same pictures and seeds:

# %%
rewarded = {(name, passes): row[minus] for name, row in variants.items() if "minus_before" in row
            for passes, minus in ((1, "minus_before"), (4, "passes_minus_before"))}
pd.DataFrame({line: {m: signed(row[m]) for m in (*measures, "val surplus")} for line, row in rewarded.items()}).T

# %% [markdown]
# After plain r1 rewards change nothing significantly. After pasted pictures they take away boxes that should not be
# there, and with them a few of the small tables. To the loss on tokens a box too many is a few more tokens, to the
# reward it is a worse answer.
#
# GRPO learns only from completions that are *sampled*. If a model never samples `no nutrition table`, no reward can
# teach it to: look at what your model samples before you reward it.
#
# What else people ask for, each against plain r1. *7.5 epochs* takes as many updates as *pasted*, on the real pictures
# alone; *pasted, 1 epoch*, with one made picture to each, as many as plain r1. rsLoRA scales by the root of the rank,
# [DoRA](https://arxiv.org/abs/2402.09353) learns directions and lengths apart, LoRA+ trains $B$ 16 times as fast, and
# PiSSA starts from the weights' largest singular vectors, which it needs in bf16.

# %%
others = {name: row for name, row in variants.items() if name[:3] == "r1," and "passes" not in row}
table = {name: {m: f"{row['scores'][m]['value']:.3f}" for m in ("selection", *measures)}
         | {f"{m} − r1": signed(row["minus_plain"][m]) for m in measures} for name, row in others.items()}
pd.DataFrame(table).T

# %%
rewards = json.loads(Path("rewards_7b.json").read_text())
parts, steps = rewards["median_seconds"], rewards["step_seconds"]
Markdown(f"""At 7B, with random weights on {rewards["machine"]}: the median of {len(steps)} steps by rewards (8
pictures, 4 completions each of 128 tokens, as random weights do not stop) took {np.median(steps):.0f} s, completions
{parts["generation"] / parts["a step"]:.0%} of it; {rewards["gib"]} GiB were allocated (`{rewards["command"]}`).""")

# %% [markdown]
# No adapter, no rank and no longer training mends the second table or the false alarm. Other training pictures do, and
# rewards after them take away more of the false alarms.
#
# ## 6 · How sure a box is
#
# Which number ranks right boxes (IoU > .5) before wrong ones? On `val`, `val-multi` and `val-none` together there are
# enough wrong boxes to tell. *Start* is the probability that a box begins at all, *digits* the geometric mean of the
# digits' probabilities. *Expected IoU* draws many boxes from the distributions of the digits and compares them with the
# one that was written. *Confidence* is what the pipeline shows: start times the fourth root of digits. AUROC is the
# share of pairs of a right and a wrong box that are ranked rightly; a dot is a seed.

# %%
kinds = list(plain["confidence"]["auroc"])
figure, axes = plt.subplots(figsize=(8, 0.45 * len(main) + 1.2))
for shift, kind in enumerate(kinds):
    for place, row in enumerate(main.values()):
        values = row["confidence"]["auroc"][kind]
        axes.plot(values, [place + 0.15 * (shift - 2)] * len(values), "o", color=plots.COLOURS[shift], markersize=4,
                  label=kind if place == 0 else None)
axes.set_yticks(range(len(main)), main)
axes.invert_yaxis()
axes.set(xlabel="AUROC", xlim=(0.4, 1))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plots.finish(figure)

# %% [markdown]
# A last digit that might be its neighbour hardly moves a box, so the digits count less than the start; the root was
# chosen on `selection` with a made picture to each. Start and digits are there once the text is generated; the expected
# IoU needs the distributions of all digits, and ranks little better.
#
# Is the confidence a probability? `ece of the confidence` is its expected calibration error on the three splits. `ece`
# is that of a logistic regression on the logarithms of both parts, fitted on `selection` with a made picture to each.
# `precision` and `recall` are those above the limit that gives 95 % precision where it was fitted; all are means over
# seeds.

# %%
table = pd.DataFrame({name: pd.DataFrame(row["confidence"]["calibrated"], dtype=float).mean()
                      for name, row in main.items()}).T
for part in ("wrong", "boxes"):
    table.insert(0, part, [round(np.mean(row["confidence"][part])) for row in main.values()])
table.style.format(precision=3, na_rep="no such limit")

# %% [markdown]
# Calibrated on pictures of another kind than those in use, a probability is off. A practitioner calibrates on photos of
# their own.
#
# ## 7 · What to switch on
#
# * **Your photos show one table each**: nothing. The default stays `paste=0` and `passes=1`, as in the published
#   protocol: it draws few boxes too many, and trains in about a quarter of the updates.
# * **Some show several, or none, and you must know**: `r5-reward` with `paste=1.5` and three epochs. Pasted pictures
#   need the epochs: in as many updates as the plain recipe has, they cost more boxes than they bring. Rewards then take
#   away boxes too many. If most of your photos show none, `paste=4`.
# * **You must find them all, and can throw away a few**: `paste=4` and `passes=4`. The passes are stored with the
#   model, and the page and `make predict` look as often.
# * **You can take real photos of that kind**: do. Made pictures stand in for them, and a model that has learned from
#   collages draws more boxes too many on photos of another kind than its own: look at some before you use it.
#
# All are the same parameters at 7B, where they were not measured.
#
# ```sh
# papermill pipeline.ipynb out.ipynb -p recipe r5-reward -p paste 1.5 -p epochs 3
# ```
