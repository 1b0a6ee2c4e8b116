# %% [markdown]
# # How fast, against what, and how far from the limit
#
# A run costs money by the hour. This notebook takes a training step apart and makes it faster, always compared with
# **stock**: TRL's `SFTTrainer` in the published way (batches of 2 whose gradients are accumulated, gradient
# checkpointing). Everything is measured here, on the tiny model and the embedded pictures; section 6 shows what the
# same changes bring at 7B on a GPU.
#
# 1. The limit: what a step needs, and how fast a matrix product is
# 2. Training, one change after the other
# 3. Where the time goes
# 4. A vision tower that does not train can encode each picture once
# 5. Inference: one by one, in batches, and constrained
# 6. 7B on a GPU

# %% tags=["parameters"]
steps = 4  # of each training that is timed
pictures = 24  # of val, for inference
batch_size = 24  # pictures in a batch of inference
seed = 0

# %%
import os

os.environ |= {"TQDM_DISABLE": "1", "KINETO_LOG_LEVEL": "99"}  # no progress bars, no notices from the profiler
from helpers.topics.opening import opening

opening(globals(), "seed", steps=range(2, 101), pictures=range(2, 124), batch_size=range(2, 1025))

# %%
import json
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown
from peft import LoraConfig, get_peft_model
from torch.profiler import profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed
from trl import SFTTrainer

from helpers import collate, model, plots, predict, runs, speed, trainer
from helpers.boxes import CATEGORIES
from helpers.recipes import RECIPES
from helpers.topics.training import PROMPT, load, nf4, rows_and_processor, trainer_for

# %%
rows, processor = rows_and_processor(train=8 * steps, selection=1, val=pictures)
collator, scratch = collate.Collator(processor, PROMPT), Path(tempfile.mkdtemp())
batch = collator([rows["train"][i] for i in range(8)])
print(f"{runs.machine()}, {torch.get_num_threads()} thread(s), {model.compute_dtype()}")

# %%
def adapted(recipe, config=None):
    """The base, quantized as `config` says, with the recipe's LoRA."""
    set_seed(seed)
    targets = RECIPES[recipe][-1].lora_targets
    return get_peft_model(load(config), LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))

# %% [markdown]
# ## 1 · The limit
#
# Two numbers make a limit: how many operations a step needs, and how many a second this machine does at its best. The
# first is counted by PyTorch's `FlopCounterMode` during a forward and a backward pass: here r4's, LoRA on both towers.
# The second is the rate of a large matrix product in the model's dtype. Their ratio is the fastest that training could
# ever be, and **MFU** is the share of it that a training reaches.

# %%
square = torch.randn(1024, 1024, dtype=model.compute_dtype())
rate = 2 * 1024**3 / Timer("square @ square", globals={"square": square}).blocked_autorange().median
with FlopCounterMode(display=False) as counter:
    adapted("r4-joint")(**batch).loss.backward()
counts = counter.get_flop_counts().items()
flops = {name.rpartition(".")[2]: sum(operations.values()) / 8e9 for name, operations in counts}
limit = rate / 1e9 / flops["Global"]
vision, head = (flops[part] / flops["Global"] for part in ("visual", "lm_head"))
Markdown(f"""A matrix product reaches **{rate / 1e9:.0f} GFLOP/s** here. A picture needs {flops["Global"]:.1f} GFLOP.
The vision tower takes {vision:.0%} of that and the head {head:.0%}: it encodes four patches for each image token. So r4
could train {limit:.0f} pictures a second, if small layers were as fast as large matrix products.""")

# %% [markdown]
# ## 2 · Training, one change after the other
#
# Each row is a real training of a few steps of 8 pictures, for r4: NF4 base, LoRA on both towers. The rate is what
# Trainer itself reports.

# %%
def rate_of(recipe="r4-joint", kind=trainer.BoxTrainer, cached=False, **options):
    """Pictures a second of a short training."""
    tuned = adapted(recipe, nf4())
    own = speed.CachedFeaturesCollator(collator, tuned, rows["train"], scratch / "cached", 8) if cached else collator
    sft = trainer_for(tuned, own.rows if cached else rows["train"], processor, scratch, kind, own,
                      max_steps=steps, seed=seed, **options)
    return sft.train().metrics["train_samples_per_second"]


published = {"gradient_checkpointing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
rate_of()  # the first training of a process is slower
ladder = pd.Series({
    "stock": rate_of(kind=SFTTrainer, **published),
    "our trainer": rate_of(**published),
    "+ activations kept": rate_of(**published | {"gradient_checkpointing": False}),
    "+ batches of 8": rate_of(),
})
pd.DataFrame({"pictures/s": ladder, "× stock": ladder / ladder["stock"], "MFU, %": 100 * ladder / limit}).round(2)

# %% [markdown]
# All of them compute the same: `tests/test_speed.py` compares losses and gradients.
#
# * **Gradient checkpointing** recomputes activations to save memory. Where memory suffices, do without.
# * **Larger batches** give the machine larger matrices. The update is the same, since fewer gradients are accumulated.
#
# How much each change brings depends on the machine, and a rate of so few steps is a rough one: only large differences
# mean something. Our trainer by itself is not meant to be faster: it adds exact checkpoints. Section 6 shows what the
# changes bring on a GPU.
#
# ## 3 · Where the time goes
#
# The profiler adds up the operations of one step:

# %%
tuned = adapted("r4-joint", nf4()).train()
with profile() as profiler:
    tuned(**batch).loss.backward()
attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
spent = pd.Series({event.key.replace(attention, "attention").removeprefix("aten::"): event.self_cpu_time_total / 1000
                   for event in profiler.key_averages()}).sort_values()
axes = spent.tail(8).plot.barh(xlabel="ms of a step of 8 pictures")
plots.finish(axes.figure)

# %% [markdown]
# Matrix products (`mm`, `addmm`) and attention are what the limit counts. All the rest is overhead: element-wise
# operations and copies between dtypes. On a GPU the project fuses most of it (`helpers/speed.py`).
#
# ## 4 · A tower that does not train can encode each picture once
#
# In r1 and in r3's second stage the vision tower is frozen, and the pictures are the same in each epoch. So its
# features are computed once, before the training, and cached in a file. That does not work with augmentation, where
# each epoch has other pictures.

# %%
frozen = pd.Series({
    "stock": rate_of("r1-llm-only", SFTTrainer, **published),
    "ours": rate_of("r1-llm-only"),
    "ours, cached vision features": rate_of("r1-llm-only", cached=True),
})
pd.DataFrame({"pictures/s": frozen, "× stock": frozen / frozen["stock"]}).round(2)

# %% [markdown]
# The time to compute the features is not part of the last row. It is one forward pass of the tower for each picture, in
# place of one in every epoch.
#
# ## 5 · Inference
#
# The same pictures one by one and in a batch, greedy and with the same stopping rule; first free, then constrained to
# completions in the project's format.

# %%
vlm = load()
vlm.set_attn_implementation(model.attention(training=False))
val, greedy, found, baseline = list(rows["val"]), {"max_new_tokens": 64, "do_sample": False}, {}, None
predict.generate_lines(vlm, processor, val[:1], PROMPT, greedy)  # not timed
for way, names in (("free", None), ("constrained", CATEGORIES)):
    for size in (1, batch_size):
        start, lines = time.perf_counter(), []
        for first in range(0, len(val), size):
            lines += predict.generate_lines(vlm, processor, val[first : first + size], PROMPT, greedy, names)
        took = 1000 * (time.perf_counter() - start) / len(val)
        baseline = baseline or lines
        same = sum(a["boxes"] == b["boxes"] for a, b in zip(lines, baseline, strict=True))
        found[way, f"batches of {size}"] = {"ms a picture": round(took), "same boxes": f"{same} of {len(val)}"}
pd.DataFrame(found).T

# %% [markdown]
# A batch shares the cost of reading the weights for each new token. The vision tower's work stays the same for each
# picture, so it limits what a batch can gain on a CPU.
#
# ## 6 · 7B on a GPU
#
# `make bench` on a machine with a GPU builds the published 7B architecture with random weights and lets stock, Unsloth
# (where its Python is given) and ours train in turns, three rounds each: what else the machine does then strikes all of
# them. It writes `performance_7b.json`.

# %%
report = json.loads(Path("performance_7b.json").read_text())
print(f"{report['device']}, {report['model']}, torch {report['torch']}, commit {report['commit']}")
measured = pd.DataFrame([row for row in report["train"] if "failed" not in row])
axes = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")[1]
for ax, (recipe, found) in zip(axes, measured.groupby("recipe", sort=False), strict=True):
    bars = ax.barh(found["name"].str.removesuffix(", r1"), found["pictures_per_s"],
                   color=["tab:blue" if kind == "ours" else "lightgray" for kind in found["kind"]])
    texts = [f"{rate:.1f}, {gib:.0f} GiB" for rate, gib in zip(found["pictures_per_s"], found["peak_gib"], strict=True)]
    ax.bar_label(bars, texts, padding=3)
    ax.set(title=f"{recipe}: pictures/s and peak memory", xlim=(0, 1.35 * found["pictures_per_s"].max()))
    ax.invert_yaxis()

# %% [markdown]
# Where does the time go? A step was taken apart: vision tower and language model alone, a quarter of their layers, on
# one H100:

# %%
print(f"{report['tried']['what']}; {report['kernels']['what']}:")
parts = pd.DataFrame({part: report["kernels"][part] for part in ("vision", "language")}).T
axes = parts.plot.barh(stacked=True, figsize=(9, 1.8), xlabel="ms")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1.1))
plots.finish(axes.figure)

# %% [markdown]
# Products of large matrices are what a GPU is made for; the rest is where something can be won. What was tried, before
# and after in ms; a change stays only where it pays:

# %%
steps = pd.DataFrame(report["tried"]["steps"])
steps["gain"] = (1 - steps["after_ms"] / steps["before_ms"]).map("{:+.0%}".format)
steps.set_index("change").rename_axis(None).rename(columns={"before_ms": "before", "after_ms": "after"})

# %% [markdown]
# * **LoRA's small products read large inputs.** PEFT reads x for dropout, for the product with A, and writes a mask.
#   One kernel (`helpers.kernels`) reads x once and computes the mask from a counter, so that nothing is stored; layers
#   with the same x (query, key, value) share it.
# * **Attention of the vision tower** is per picture. transformers splits, copies and joins query, key and value in each
#   layer. Here they stay one tensor, and the kernel reads parts of it.
# * **Recomputing** costs a third of a step. So a trial finds how many layers can keep everything, and where layers
#   recompute, attention's outputs are kept: they are small, and dear to make. PyTorch's own way to keep single
#   operations (a policy for selective checkpointing) passes each through Python, which costs more than it saves.
# * **Fewer pictures at once** save memory too, but a GPU this fast then waits for Python to launch the next kernel.

# %%
generated = pd.DataFrame(report["generation"]).set_index("name")["s_for_123"].round(1)
print(f"123 pictures, s: {generated.to_dict()}\n{report['inference']['what']}:")
ways = pd.DataFrame(report["inference"]["ways"]).T
ways.assign(total=ways.sum(axis=1))

# %% [markdown]
# Prefill and the vision tower are the time of inference, and both are products and attention of large matrices. The
# kernel that makes the tower's attention faster in training plans anew for each size of picture. That costs more than
# it saves on a few hundred pictures, so inference does without. Small batches decode longer and gain nothing.
#
# Also tried and dropped: another optimizer and ready pixel values (updates and waiting for data are a few per cent of a
# step), compiling whole layers (fails in this version of PyTorch), Liger kernels (do not load with this version of
# transformers), packing (too little padding, see `03_data_preprocessing`).
