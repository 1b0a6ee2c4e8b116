# %% [markdown]
# # How fast, against what, and how far from the limit
#
# A run costs money by the hour. This notebook takes a training step apart and puts it together faster, always against
# **stock**: TRL's `SFTTrainer` with its own collator, in the published way (batches of 2, gradients added up to 16
# pictures, gradient checkpointing). Everything is measured here, in one process, on the embedded model and pictures:
#
# 1. The limit: a matrix product's rate, and what a step needs
# 2. Training, stock against ours, one change after the other
# 3. Where the time goes
# 4. A vision tower that does not train sees each picture once
# 5. Answers: one by one, in batches, and with the form given
# 6. How time grows with pictures and their size
# 7. Padding: is packing worth it?
# 8. 7B, where `make bench` has run on a GPU
# 9. What was predicted, what came out, what was kept

# %% tags=["parameters"]
train_pictures = 32  # that the variants take in turn
pictures = 24  # of val, answered in every way
batch_size = 32  # pictures answered at once
steps = 3  # of each variant; the first is not counted
seed = 0

# %%
from helpers import parameters

known = {"train_pictures": parameters.whole(8, 1083), "pictures": parameters.whole(2, 121),
         "batch_size": parameters.whole(2, 1024), "steps": parameters.whole(2, 100),
         "seed": parameters.whole(0, 2**31 - 1)}  # fmt: skip
parameters.given(globals(), known)
parameters.check({name: globals()[name] for name in known}, known)

# %%
import os

os.environ["TQDM_DISABLE"] = "1"  # a bar a variant would be many
from helpers import runs

runs.quiet_libraries()
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers import budget, data, grammar, messages, model, predict, sizes
from helpers.boxes import CATEGORIES
from helpers.dev import bench_clock, bench_growth, bench_report, bench_steps, random_7b
from helpers.dev.bench_predict import load
from helpers.dev.bench_steps import PROMPT, Variant
from helpers.plots import speed as draw
from helpers.recipes import RECIPES, SCALES
from helpers.settings import TINY_BASE

# %%
tiny = SCALES["tiny"]
pixels = {name: tiny[name] for name in ("min_pixels", "max_pixels")}
raw = data.load_raw("embedded", limit={"train": train_pictures, "selection": 1, "val": pictures})
rows = data.prepare(data.clean(raw, data.audit(raw)), **pixels)
processor = Qwen2VLProcessor.from_pretrained(TINY_BASE, **pixels)
dtype = model.compute_dtype()  # bf16; fp32 on a CPU that has no instructions for it
base = {held: load(str(TINY_BASE), held, dtype=dtype).requires_grad_(False) for held in ("nf4", "bf16")}
for vlm in base.values():
    vlm.set_attn_implementation(model.attention())  # the one that trains faster here
print(f"{runs.machine()}, {torch.get_num_threads()} thread(s), {dtype}; {len(rows['train'])} pictures to train on, "
      f"{len(rows['val'])} to answer")

# %% [markdown]
# ## 1 · The limit
#
# Two numbers make a limit: how many operations a step *needs*, and how many a second this machine does at its best.
# Needed are the forward pass, the gradients that have to pass through, and the gradients of what trains. A frozen
# weight has no gradient, and an activation that is worked out twice was needed once. The best is a large square matrix
# product, in bf16 where the machine has it, as the model. **MFU** is the share of it that a step reaches.

# %%
rate = bench_clock.matmul_rate(1024, 10)
with torch.device("meta"):  # 7B by its published configuration: shapes, no memory
    seven = Qwen2VLForConditionalGeneration(random_7b.config(random_7b.PUBLISHED))
needs = {}
for name, vlm, grid, tokens, rank in (("tiny, 144 image tokens", base["bf16"], (1, 24, 24), 204, tiny["lora_rank"]),
                                      ("7B, 1280 image tokens", seven, (1, 64, 80), 1345, SCALES["7b"]["lora_rank"])):
    for recipe in ("r1-llm-only", "r2-vision-only", "r4-joint"):
        needs[name, recipe] = sizes.training_flops(vlm, RECIPES[recipe][-1], rank, grid, tokens, answer=30)
table = pd.DataFrame(needs).T.assign(total=lambda frame: frame.sum(axis=1)) / 1e9
display(table.round(2))
share = table.loc[("7B, 1280 image tokens", "r4-joint")]
best = rate / 1e9 / table.loc[("tiny, 144 image tokens", "r4-joint"), "total"]
Markdown(f"""Thousand millions of operations a picture. A matrix product reaches **{rate / 1e9:.0f} GFLOP/s** here, so
that r4 could train {best:.0f} pictures a second if a step were nothing else: small layers are far from that. At 7B the
vision tower needs {share['vision'] / share['total']:.0%} of r4's operations; the head, with the answer's tokens alone,
{share['head'] / share['total']:.1%}.""")

# %% [markdown]
# ## 2 · Stock against ours
#
# One change after the other, for r4 (NF4 base, LoRA on both towers). Each line is a real training of a few steps
# through the trainer's own loop, from fresh adapters. The rate is for 16 pictures and one update, from medians.
# On a CPU without instructions for bf16 stock has a handicap of its own: TRL holds LoRA of a quantised base in bf16,
# which such a CPU works out in software, and ours holds it in fp32.

# %%
def measured(*variants, held="nf4"):
    """`bench_steps.measure` for each variant, 16 pictures an update; one that fails stops the notebook."""
    found = []
    for variant in variants:
        accumulation = 2 if variant.micro_batch < 8 else 1
        row = bench_steps.measure(variant, base[held], processor, rows["train"], rank=tiny["lora_rank"], rate=rate,
                                  pictures=16, steps=steps, accumulation=accumulation)
        assert "failed" not in row, row["failed"]
        found.append(row)
    return found


stock = Variant("stock", kind="stock")
slow = Variant("our trainer and collator", kind="as-trl")
whole = Variant("+ activations kept", checkpointing=False)
ladder = measured(stock, slow, whole, replace(whole, name="+ micro-batches of 8", micro_batch=8),
                  replace(whole, name="(the same, logits of all tokens)", kind="all-logits", micro_batch=8))

# %%
def shown(found, against):
    """The measured rows as a table, in shares of `against`."""
    return pd.DataFrame([{
        "": row["name"], "pictures/s": row["pictures_per_s"], "× stock": row["pictures_per_s"] / against,
        "tokens/s": row["tokens_per_s"], "MFU, %": 100 * row["mfu"],
        "ms a picture": 1000 / row["pictures_per_s"]} for row in found]).set_index("").round(2)  # fmt: skip


by_name = {row["name"]: row for row in ladder}
times = {name: row["pictures_per_s"] / ladder[0]["pictures_per_s"] for name, row in by_name.items()}
display(shown(ladder, ladder[0]["pictures_per_s"]))
ours, last = by_name["+ micro-batches of 8"], times["(the same, logits of all tokens)"]
gain = times["+ activations kept"] / times["our trainer and collator"]
Markdown(f"""Ours trains **{times['+ micro-batches of 8']:.2f} ×** as many pictures a second as stock, at
{100 * ours['mfu']:.1f} % of the limit. Not working activations out twice brings {gain:.2f} ×, larger micro-batches
{times['+ micro-batches of 8'] / times['+ activations kept']:.2f} ×. The logits of the prompt are *not* the reason: TRL
has left them out on a GPU since it has a fused head, so does ours, and with the logits of every token it is
{last / times['+ micro-batches of 8']:.2f} × as fast here, where the vocabulary is small.

All of them compute the same: losses and gradients are compared in `tests/test_speed.py`, the frozen tower (below) to
the last bit, the loss from the answer's logits to fp32 rounding.""")

# %% [markdown]
# ## 3 · Where the time goes
#
# The same steps by part: marks where a micro-batch enters and leaves a tower, forward and backward.

# %% tags=["thumbnail"]
frozen = [replace(stock, name="stock, r1", recipe="r1-llm-only"),
          replace(whole, name="r1, micro-batches of 8", recipe="r1-llm-only", micro_batch=8),
          replace(whole, name="r1, + pictures seen once", recipe="r1-llm-only", micro_batch=8, cached=True)]
frozen = measured(*frozen)
draw.splits([*ladder[:-1], *frozen], 16)

# %%
split = ours["split_s"]
waiting, update = (split[part] / sum(split.values()) for part in ("waiting for data", "optimiser"))
Markdown(f"""In r4 the vision tower takes {split['vision'] / sum(split.values()):.0%} of a step, the language model
{split['language'] / sum(split.values()):.0%}: a picture has four times as many patches as image tokens. Waiting for
data takes {waiting:.1%} and the update {update:.1%}, so that neither ready pixel values nor another optimiser has much
to win.""")

# %% [markdown]
# ## 4 · A tower that does not train sees each picture once
#
# In r1 (and r3's second stage) the vision tower is frozen and the pictures stay the same: what it sees in the second
# epoch is what it saw in the first. So it looks once, before the training, and the answers are kept in a file without a
# name. Not with augmentation, where each epoch has other pictures, nor with one epoch.

# %%
display(shown(frozen, frozen[0]["pictures_per_s"]))
r1, once = frozen[1]["pictures_per_s"], frozen[2]["pictures_per_s"]
seen = frozen[1]["split_s"]["vision"] / 16  # seconds a picture
epochs = tiny["epochs"]
Markdown(f"""A step that has the features is **{once / r1:.2f} ×** as fast. They have to be computed once: with
{epochs} epochs that leaves {epochs / r1 / (epochs / once + seen):.2f} × for the whole training, and
{epochs / frozen[0]['pictures_per_s'] / (epochs / once + seen):.2f} × against stock.""")

# %% [markdown]
# The recipes as the pipeline trains them, side by side; r3's two stages are r2 and r1.

# %%
recipes = [frozen[2], *measured(replace(whole, name="r2, vision tower in fp32", recipe="r2-vision-only", micro_batch=8),
                                held="bf16"), ours]  # fmt: skip
named = [row | {"name": row["recipe"]} for row in recipes]
display(shown(named, ladder[0]["pictures_per_s"]))
slowest = min(named, key=lambda row: row["pictures_per_s"])
quickest = max(named, key=lambda row: row["pictures_per_s"])
Markdown(f"""`× stock` is against stock r4. {slowest['name']} is the slowest with {slowest['pictures_per_s']:.1f}
pictures a second, {quickest['name']} the fastest with {quickest['pictures_per_s']:.1f}; r1's tower has looked before.
""")

# %% [markdown]
# ## 5 · Answers
#
# The same pictures are answered one by one and in one batch, greedy and with the same stopping rule, first freely, then
# with only the answer's form let through. Forced tokens (markup, brackets, commas) could also be filled in without
# asking the model: the grammar says how many of an answer's tokens they are.

# %%
limits, asked = {"max_new_tokens": 64, "do_sample": False}, list(rows["val"])


def answered(vlm, at_once, names=None):
    """Seconds to answer all pictures, and the lines."""
    start, lines = time.perf_counter(), []
    for first in range(0, len(asked), at_once):
        lines += predict.generate_lines(vlm, processor, asked[first : first + at_once], PROMPT, limits, names)
    return time.perf_counter() - start, lines


base["bf16"].set_attn_implementation(model.attention(training=False))
predict.generate_lines(base["bf16"], processor, asked[:1], PROMPT, limits)  # not timed
answers, names = [], CATEGORIES
for way, given in (("free", None), ("form given", names)):
    alone, one = answered(base["bf16"], 1, given)
    together, many = answered(base["bf16"], batch_size, given)
    same = sum(a["boxes"] == b["boxes"] for a, b in zip(one, many, strict=True))
    answers.append({"": way, "one by one, s": alone, "in batches, s": together, "ratio": alone / together,
                    "s for 123": 123 * together / len(asked), "same boxes": f"{same}/{len(asked)}"})
answers = pd.DataFrame(answers).set_index("")
answers.round(2)

# %%
some = [row["image"].convert("RGB") for row in asked[:8]]
inputs = processor.image_processor(some, return_tensors="pt")
start = time.perf_counter()
with torch.inference_mode():
    predict.look(base["bf16"], inputs["pixel_values"], inputs["image_grid_thw"])
looking = (time.perf_counter() - start) / len(some)
form, forced, tokens = grammar.Grammar(processor.tokenizer, names, max_new_tokens=128), 0, 0
for row in asked:
    answer = form.answer()
    choices = next(answer)
    target = messages.target_text(row["objects"]) + messages.END_OF_TURN
    for token in processor.tokenizer.encode(target, add_special_tokens=False):
        forced, tokens = forced + (len(choices) == 1), tokens + 1
        choices = answer.send(token)
free = answers.loc["free"]
vision = looking * len(asked) / free["in batches, s"]
ceiling = 1 / (1 - (1 - vision) * forced / tokens)
Markdown(f"""In batches the answers come **{free['ratio']:.1f} ×** as fast as one by one. The vision tower works as long
for a picture in a batch as for one alone on a CPU, and is {vision:.0%} of the batched time: without a faster tower no
batch could bring more than {free['one by one, s'] / (looking * len(asked)):.1f} ×. The grammar forces
{forced / tokens:.0%} of the tokens of a true answer. Were they free of charge, a batch would be at most {ceiling:.2f} ×
as fast, and only with `constrained`, which the published protocol is not. It would also need a cache with holes, as the
answers of a batch do not stand at the same place.""")

# %% [markdown]
# ## 6 · How it grows
#
# Four, sixteen times the pictures: the same time a picture, so a straight line. Two processes share the pictures and
# the cores, and add their gradients up. Larger pictures: more patches, whose layers grow in proportion, and attention,
# which grows with the square. Pictures and processes are timed whole, from the first micro-batch to the update and from
# the first question to the last answer.

# %%
found = pd.DataFrame(bench_growth.measure((2, 8, 32), (1, 2)))
budgets, by_size = (25, 50, 100, 200), []
for most in budgets:
    at = Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=most * 784, max_pixels=most * 784)
    by_size += [bench_steps.measure(replace(whole, name=str(most)), base["nf4"], at, rows["train"], rate=rate,
                                    rank=tiny["lora_rank"], pictures=16, steps=2, accumulation=2)]
parts = {part: [row["split_s"][part] for row in by_size] for part in ("vision", "language")}
lines, counts = {}, found["pictures"].unique().tolist()
for work, label in (("training", "pictures an update"), ("answering", "pictures answered")):
    took = {f"{n} process{'es' * (n > 1)}": list(rows_of[work]) for n, rows_of in found.groupby("processes")}
    lines[work] = (label, counts, took)
display(draw.growth(lines | {"size of a picture": ("image tokens", budgets, parts)}))
by_count = found.pivot(index="pictures", columns="processes")
grown = by_count.iloc[-1] / by_count.iloc[0]
shared = by_count.iloc[-1]
slope = {part: np.polyfit(np.log(budgets), np.log(values), 1)[0] for part, values in parts.items()}
Markdown(f"""{counts[-1] // counts[0]} times the pictures take {grown['training', 1]:.1f} times as long to train on and
{grown['answering', 1]:.1f} times to answer; with two processes {grown['training', 2]:.1f} and
{grown['answering', 2]:.1f} times. From {budgets[0]} to {budgets[-1]} image tokens the vision tower's time grows by the
power {slope['vision']:.2f}, the language model's by {slope['language']:.2f} (1 is in proportion; the text's tokens stay
the same, so the language model begins below). Two processes on the same cores train
{shared['training', 1] / shared['training', 2]:.2f} × as many pictures a second as one, and answer
{shared['answering', 1] / shared['answering', 2]:.2f} ×.""")

# %% [markdown]
# ## 7 · Padding
#
# Packing sequences into one row would save the padding, and need M-RoPE positions a picture and a block-diagonal mask.
# Worth it only from 15 % on, we said beforehand. The embedded sizes at the tiny budget; at 7B a mix of sizes that
# people's photos have (an assumption, the one of `03_data_preprocessing`).

# %%
rng, text = np.random.default_rng(seed), 65  # tokens of text around a picture
mix = {(3024, 4032): 25, (4032, 3024): 10, (3000, 3000): 5, (2268, 4032): 10, (1200, 1600): 20, (1080, 1920): 10,
       (600, 800): 10, (400, 500): 5, (700, 250): 5}  # per cent  # fmt: skip
photos = rng.choice(list(mix), 4000, p=np.array(list(mix.values())) / 100)
own = list(zip(rows["train"]["width"], rows["train"]["height"], strict=True)) * 20
waste = {}
for scale, photo_sizes in (("tiny", own), ("7b", photos)):
    limits_of = [SCALES[scale][name] for name in ("min_pixels", "max_pixels")]
    lengths = budget.image_tokens(photo_sizes, *limits_of) + text
    waste[scale] = {n: budget.padding_share(lengths, rng.permutation(len(lengths)), n) for n in (2, 4, 8)}
most = max(waste[scale][SCALES[scale]["batch_size"]] for scale in waste)
display(pd.DataFrame(waste).rename_axis("batches of").style.format("{:.1%}"))
Markdown(f"""In the batches that are trained at most **{most:.1%}** is padding:
{'below 15 %, so nothing is packed' if most < 0.15 else 'above 15 %: packing would pay'}.""")

# %% [markdown]
# ## 8 · 7B
#
# `make bench` on a machine with a GPU builds the published 7B architecture with random weights, measures the same there
# and more, and writes `performance_7b.json` beside this notebook. *Fused* is `helpers/fused.py`: LoRA's product is
# added to the layer's output in place, norms, activations and rotations are compiled. *As the pipeline trains* is that,
# and as many layers as the memory allows keep their activations.

# %%
report = bench_report.read()
if report is None:
    display(Markdown(f"**{bench_report.NOT_RUN}** Everything above is tiny, on this machine."))
else:
    display(Markdown(bench_report.table(report)))

# %% [markdown]
# ## 9 · Predicted, measured, kept
#
# What a change should bring at 7B was written down before the benchmark ran there; a dash is not measured.

# %%
def at_7b(name, against):
    """How many times as fast as `against` the variant is in the 7B report."""
    fast = {row["name"]: row["pictures_per_s"] for row in (report or {}).get("train", []) if "failed" not in row}
    return fast[name] / fast[against] if name in fast and against in fast else None


eight, lengths_7b = "checkpointing, micro-batch 8", "vision lengths stay on the CPU"
trl_7b, fused_7b, ours_7b = "our trainer, nothing else changed", f"{eight}, fused", "ours, as the pipeline trains"
took_7b = {(row["batch"], row["compiled"]): row.get("s_for_123") for row in (report or {}).get("answer", [])
           if row["precision"] == "bf16"}  # fmt: skip
alone_7b, together_7b, compiled_7b = (took_7b.get(way) for way in ((1, False), (123, False), (123, True)))
best = times["+ micro-batches of 8"]
outcomes = [
    ("no logits of the prompt", 1.05, at_7b(trl_7b, "logits of every token"), best / last, "TRL's own on a GPU"),
    ("LoRA's input stays in bf16", 1.03, None, None, "dropped: no faster"),
    (lengths_7b, 1.1, at_7b(lengths_7b, trl_7b), None, "kept: two lines, on a GPU"),
    ("no checkpointing", 1.33, at_7b("no checkpointing", lengths_7b), gain, "kept: where memory allows it"),
    ("micro-batches of 8", 1.1, at_7b(eight, lengths_7b), best / times["+ activations kept"], "kept: the default"),
    ("LoRA in place, small operations compiled", 1.3, at_7b(fused_7b, eight), None, "kept: on one GPU"),
    ("some layers keep their activations", 1.1, at_7b(ours_7b, fused_7b), None, "kept: as many as memory allows"),
    ("frozen tower sees once, a step", 1.3, None, once / r1, "kept: r1, r3's second stage"),
    ("bf16 base", 1.1, None, None, "precision=bf16, where it fits"),
    ("whole layers compiled", 1.2, at_7b(f"{eight}, compiled layers", eight), None, "dropped: torch 2.11 fails on it"),
    ("Liger kernels", 1.1, at_7b(f"{eight}, Liger kernels", eight), None, "dropped: 0.8.5 does not load"),
    ("another optimiser, at most", 1.01, None, 1 / (1 - update), "dropped: it is fused already"),
    ("ready pixel values, at most", 1.0, None, 1 / (1 - waiting), "dropped: workers do it on a GPU"),
    ("packing, at most", 1.05, None, 1 / (1 - most), "dropped" if most < 0.15 else "open"),
    ("answers in batches", 10, alone_7b and alone_7b / together_7b, free["ratio"], "kept; pictures are opened ahead"),
    ("answers, small operations compiled", 1.3, compiled_7b and together_7b / compiled_7b, None,
     "dropped: takes 15 s to compile"),
    ("forced tokens, at most", 1.3, None, ceiling, "dropped: were they free of charge"),
]  # fmt: skip
columns = ["predicted, 7B", "measured, 7B", "measured here"]
outcomes = pd.DataFrame(outcomes, columns=["", *columns, "outcome"]).set_index("").astype(dict.fromkeys(columns, float))
outcomes.style.format("{:.2f} ×", columns, na_rep="–")

# %%
Markdown(f"""On this machine ours trains r4 at {times['+ micro-batches of 8']:.2f} × and r1 at
{once / frozen[0]['pictures_per_s']:.2f} × the rate of stock, with the same losses, and answers
{free['ratio']:.1f} × as fast as one by one. 7B: {'measured, above' if report else 'not run'}.""")
