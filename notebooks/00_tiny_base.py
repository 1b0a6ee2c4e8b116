# %% [markdown]
# # The tiny base: what is it, and what can it do?
#
# The pipeline of this project runs on Qwen2-VL-7B, and on a laptop. For the laptop there is a *tiny base*: the same
# architecture, the same processor, the same chat template, five and a half million parameters. This project trained it
# from random weights to find things on packaging: barcodes, logos, ingredient lists, price tables. It was never given
# the words "nutrition table". So it starts where the 7B model starts: it can find things by their name, and has to
# learn *this* one.
#
# The notebook shows what the base is, what it learned from, how it was trained, which trials failed, and what it can
# do.

# %% tags=["parameters"]
retrain = False  # True trains from random weights: an hour on a GPU, days on a CPU; goes on where it stopped
out = "runs/tiny"  # where a retraining writes
steps = 12200  # as many as the shipped weights took
batch = 128  # pictures a step
each = 3  # prompts a picture
scenes = 28000  # rendered for the training
workers = 2
seed = 0
checked = 60  # prompts at the end

# %%
from helpers.topics.opening import opening

opening(globals(), "seed", retrain=bool, out="a folder", steps=range(1, 10**7), batch=range(1, 4097),
        each=range(1, 65), scenes=range(1, 10**6), workers=range(1, 257), checked=range(8, 1001))

import inspect
import json
import random
from pathlib import Path

import pandas as pd
from IPython.display import display
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers import plots
from helpers.boxes import area
from helpers.messages import parse_text
from helpers.tiny import TINY_DIR, check, train
from helpers.tiny.pictures import load_pool
from helpers.tiny.prompts import by_name, made_up_name, prompt_for

# %% [markdown]
# ## What it is
#
# Its folder has the same files as a model on the Hub, so transformers' own classes load it, offline.

# %%
if retrain:
    train.retrain(out, steps=steps, batch=batch, each=each, scenes=scenes, seed=seed, workers=workers, checked=checked)
folder = Path(out) if retrain else TINY_DIR
processor = Qwen2VLProcessor.from_pretrained(folder)
model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
print(f"{type(model).__name__} of {model.num_parameters():,} parameters, {model.dtype}")

# %%
tower, language = model.model.visual, model.model.language_model
parts = {"vision: patches": tower.patch_embed, "vision: blocks": tower.blocks, "vision: merger": tower.merger,
         "language: embeddings": language.embed_tokens, "language: layers": language.layers}  # fmt: skip
pd.Series({name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}).to_frame("parameters")

# %% [markdown]
# Two settings differ from the large model on purpose: `rope_theta` is 10 instead of a million, and most rotary
# frequencies go to height and width. With the published values the position along the width hardly turns anything in a
# grid of 8 × 11 image tokens ([02_model_understanding](02_model_understanding.ipynb) computes the angles).

# %%
model.config.text_config.rope_parameters

# %% [markdown]
# The tokenizer splits text by Qwen2's own pattern, every digit alone. It learned its merges, over bytes, from the
# project's prompts and completions. A word that is not in those falls into pieces, and no text is unknown to it. (`Ġ`
# is a space.)

# %%
print(f"{len(processor.tokenizer)} tokens:", processor.tokenizer.tokenize("Detect the nutrition table. (278,495)"))


# %% [markdown]
# ## What it learned from
#
# From scenes of its own, which are in none of the pipeline's splits. In two of three, another table is where a
# nutrition table would be, in the same style and size: the drug facts of an American medicine, cooking times, prices,
# doses. So it learns to draw tight boxes around large tables. In the others there is a nutrition table, but no prompt
# names it. The boxes below are those of everything that a prompt can name.

# %%
def as_photo(picture):
    """A tensor [3, height, width] of the pool as a picture."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


base = load_pool("base", 24)
size = max(base.things, key=lambda size: len(base.things[size]))  # the most frequent size of a photo
pictures = []
for picture, things in zip(base.images[size][:6], base.things[size], strict=False):
    largest = things[area([box for _, box in things]).argmax()][0]
    pictures.append((f"largest: {largest}", as_photo(picture), [box for _, box in things], []))
plots.panels(pictures, columns=6)

# %% [markdown]
# A prompt names a thing, and the completion has all boxes of that name. One prompt in ten has a made-up name instead.
# So the base learns to copy a name that it does not know, and to write a box all the same: that is what "nutrition
# table" will be to it.

# %%
pd.options.display.max_colwidth = None
rng = random.Random(1)
prompts = [prompt_for(by_name(things), rng) for things in base.things[size][:5]]
display(pd.DataFrame(prompts, columns=["prompt", "completion"]))
print("made-up names:", ", ".join(made_up_name(rng) for _ in range(6)))

# %% [markdown]
# ## How it was trained
#
# The loop is short. Workers draw prompts and crops. Pictures are cropped and recoloured on the device, and the prompts
# of a picture share one pass through the vision tower. The loss is computed on the completion and its end token. Muon
# trains the matrices, AdamW the rest.

# %%
print(inspect.getsource(train.train))

# %% [markdown]
# The **guide** teaches the model to use the picture. For the first part of the training a small linear layer, half-way
# up the language model, predicts from each image token which thing is there and where that thing ends. It is thrown
# away after the training. Nutrition tables count as "nothing" for it.

# %%
print(inspect.getsource(train.Guide))

# %% [markdown]
# The guide's weight falls to zero on the way. From there on its own loss no longer falls, and the loss on the
# completions still does.

# %%
log = pd.DataFrame(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))
axes = log.plot(x="step", y=["loss", "guide"], ylim=(0, 3))
axes.set(xlabel="step", ylabel="loss")
log.iloc[[0, len(log) // 4, len(log) // 2, -1]].rename(columns={"questions": "prompts", "rate": "learning rate"})

# %% [markdown]
# One thing is left to do. Most of the tokens stand in no completion of the training. The loss only ever pushes them
# down, all in the same direction, until their rows in the head are one and the same. LoRA leaves the head as it is, so
# a fine-tuned model could not tell them apart: it would hardly ever write `no nutrition table`, which needs two of
# them. So a random vector is added to each of these rows. The rows of the tokens that were written stay as they are.

# %%
print(inspect.getsource(train.separate))

# %% [markdown]
# ## The trials, failures too
#
# `things` is the mean IoU on things in other pictures, `zero-shot` the mean IoU when prompted for a nutrition table,
# `probe` the mean IoU on the pipeline's val after a short LoRA fine-tuning, where that was run.

# %%
names = {"questions": "prompts", "things_iou": "things", "zero_shot_iou": "zero-shot", "probe_val_iou": "probe"}
trials = pd.DataFrame(json.loads((TINY_DIR / "trials.json").read_text())).set_index("trial").rename(columns=names)
trials.drop(columns="parameters").style.format(na_rep="–", precision=3, thousands=",")

# %% [markdown]
# * **A to G** differ in size, depth, resolution and learning rate, and all failed alike: on about 40,000 pictures they
#   learned to write well-formed boxes and to ignore the picture. Fine-tuned, none scored more than one constant box.
# * **H, I and K** had the guide. K also started from wider random weights, so that attention is not flat at first, and
#   trained on ten times as many pictures: it began to find things. Nothing here separates these three causes.
# * **L** has the size of K. Other tables are in the nutrition table's place, Muon trains its matrices, and it took
#   twice as many pictures.
# * **M** continued L on new scenes, and its loss ended higher: L had learned its own scenes better than others. So more
#   scenes are worth more than the same ones more often.
# * **N** had more scenes, 144 image tokens instead of 100, and prompts for tables twice as often. It ships.
#
# The trials were measured on `val` with the base's own things and the zero-shot prompt; nothing was chosen by that.
#
# ## What it can do
#
# First we prompt it for things that it was trained on, in pictures of the pipeline's `val`, which are new to it. Then
# we prompt it for a nutrition table.

# %%
pool = load_pool("val", 40)
prompts = {"things": check.thing_prompts(pool, checked), "nutrition table": check.table_prompts(pool)[:checked]}
completions = {name: check.generate(model, processor, pool, some) for name, some in prompts.items()}
pd.DataFrame({name: check.score(prompts[name], completions[name]) for name in prompts}).T.convert_dtypes()

# %%
pictures = []
for name, some in prompts.items():
    for (size, i, prompt, truth), text in zip(some[:6], completions[name], strict=False):
        thing, found = prompt.split(" of the ")[-1].rstrip("."), parse_text(text).boxes_xyxy_unit
        pictures.append((thing, as_photo(pool.images[size][i]), truth, found))
plots.panels(pictures, columns=6, names=("truth", "prediction"))

# %% [markdown]
# Prompted for a nutrition table, the base writes a well-formed box and puts it around something else. So there is
# something left to teach, and that is what `pipeline.ipynb` does. Scores on many more pictures are beside the weights,
# in `scores.json`; `python -m helpers.tiny.train runs/tiny` makes both again.
