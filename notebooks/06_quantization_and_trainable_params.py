# %% [markdown]
# # Four bits a weight: NF4, and what trains beside it
#
# QLoRA is two ideas. The frozen base is quantized to **NF4**, four bits a weight, so that 7B fits on one GPU of 24 GiB.
# What trains are **LoRA** adapters, a pair of thin matrices beside each frozen one. Both are simple enough to do by
# hand, so this notebook does them by hand, and then measures what each costs:
#
# 1. NF4 by hand, equal to bitsandbytes' bit for bit
# 2. Block size and double quantization: bytes against error
# 3. What is quantized, what must not be, and a skip list that skips nothing
# 4. The error of each layer, and what it does to the completion
# 5. Memory at 7B
# 6. LoRA's rank, against trainable weights and against IoU
# 7. Merging into NF4, into the dequantized weights, into the full-precision base: which boxes move?

# %% tags=["parameters"]
scale = "tiny"  # 7b: the published model, on a GPU of about 40 GiB
ranks = "2,8,32"  # LoRA ranks that are trained here
steps = 40  # of training, for each rank
pictures = 40  # of val, for each IoU

# %%
from helpers.topics.opening import model_path, opening

opening(globals(), scale=("tiny", "7b"), ranks=[range(1, 1000)], steps=range(1, 10**5), pictures=range(4, 124))
path = model_path(scale, None)

# %%
import re
import tempfile
from pathlib import Path

import pandas as pd
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, set_seed

from helpers import collate, data, evaluate, model, plots, predict
from helpers.recipes import RECIPES
from helpers.topics.sizes import seven_b
from helpers.topics.training import PROMPT, completion_logits, load, nf4, rows_and_processor, trainer_for

# %% [markdown]
# ## 1 · NF4 by hand
#
# Take 64 weights in a row (a *block*), divide them by the largest of them, and round each to the nearest of sixteen
# fixed levels. Store the level's number (4 bits, so two in a byte) and the block's largest weight (its *scale*). To get
# a weight back, multiply level and scale. That is all of NF4.

# %%
weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 0.02  # four blocks of 64
levels = get_4bit_type("nf4", device="cpu")  # the sixteen levels, from -1 to 1
scales = weight.abs().amax(dim=1, keepdim=True)
codes = ((weight / scales)[..., None] - levels).abs().argmin(-1)  # [4, 64], from 0 to 15
by_hand = levels[codes] * scales

packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
assert torch.equal(packed.flatten(), (codes.flatten()[::2] * 16 + codes.flatten()[1::2]).to(torch.uint8))
assert torch.equal(state.absmax, scales.flatten()) and torch.equal(dequantize_4bit(packed, state), by_hand)
pd.DataFrame({"weight": weight[0, :6], "÷ scale": (weight / scales)[0, :6], "level's number": codes[0, :6],
              "level": levels[codes[0, :6]], "level × scale": by_hand[0, :6]}).round(4).astype(object).T

# %% [markdown]
# The assertions hold: bytes, scales and values are those of bitsandbytes, for all 256 weights.
#
# **Why these levels?** Weights are roughly normal, so most of them are near zero. "NF" stands for *normal float*: the
# levels are quantiles of the normal distribution, dense near zero. Below they are drawn over the weights of a matrix of
# the language model, and compared with sixteen even steps. The error is relative to the size of the weights.

# %%
def off(changed, exact):
    """‖changed − exact‖ / ‖exact‖, in per cent: the error in all tables below."""
    return 100 * ((changed.float() - exact.float()).norm() / exact.float().norm()).item()


# %%
exact = load(dtype=torch.bfloat16, path=path)
linear = {name: layer.weight for name, layer in exact.named_modules() if isinstance(layer, nn.Linear)}
matrix = exact.model.language_model.layers[0].mlp.up_proj.weight.float().cpu().reshape(-1, 1024)
scaled = matrix.reshape(-1, 64) / matrix.reshape(-1, 64).abs().amax(dim=1, keepdim=True)
axes = pd.Series(scaled[:20_000].flatten()).plot.hist(
    bins=81, color="0.8", figsize=(6.4, 2.4), xlabel="weight / largest weight of its block of 64, and NF4's levels")
axes.vlines(levels, 0, axes.get_ylim()[1], linewidth=1.2)
plots.finish(axes.figure)

# %%
for name, sixteen in (("NF4's levels", levels), ("sixteen even steps", torch.linspace(-1, 1, 16))):
    nearest = sixteen[torch.bucketize(scaled, (sixteen[1:] + sixteen[:-1]) / 2)]
    print(f"{name}: error {off(nearest, scaled):.1f} %")

# %% [markdown]
# ## 2 · Block size and double quantization
#
# Each block needs a scale. Small blocks follow the weights more closely and cost more: an fp32 scale for 64 weights is
# 32 / 64 = half a bit a weight. **Double quantization** rounds the scales too: the mean of all scales is subtracted,
# and 256 of them at a time become one byte each with one fp32 scale: 8 / 64 + 32 / (64 · 256) = .127 bit.

# %%
bits = []
for block, double in ((64, False), (64, True), (256, False), (256, True), (1024, False), (1024, True)):
    packed, state = quantize_4bit(matrix, blocksize=block, quant_type="nf4", compress_statistics=double)
    size = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    bits.append({"block": block, "double quantization": double, "bits a weight": 8 * size / matrix.numel(),
                 "error, %": off(dequantize_4bit(packed, state), matrix)})
pd.DataFrame(bits).round(3)

# %% [markdown]
# Rounding the scales saves a third of a bit and costs next to no error, and larger blocks cost more error for what they
# save. So QLoRA takes blocks of 64 and double quantization.
#
# ## 3 · What is quantized, and what must not be
#
# The linear layers of the language model are four fifths of 7B, so they are quantized. The vision tower is not: it is a
# twelfth of the weights, and an error at the very start goes through everything after it. The head is not: it chooses
# the digits. `llm_int8_skip_modules` says so (the name is old; it holds for 4 bits too), **by the names that modules
# have today**. transformers 5 renamed the tower from `visual` to `model.visual`, and a skip list copied from an older
# script now skips nothing:

# %%
found = {}
for skip in (["model.visual", "lm_head"], ["visual", "lm_head"], ["model.visual"]):
    towers = [model.tower_of(name) for name in model.nf4_layers(load(nf4(skip=skip), path=path))]
    found[", ".join(skip)] = {tower: towers.count(tower) for tower in model.TOWERS}
pd.DataFrame(found).T.rename_axis("NF4 layers, skipping")

# %% [markdown]
# Nothing warns. So `check_precision` compares what was really quantized with what should be, and stops a run.
#
# ## 4 · The error of each layer, and of the completion
#
# How far is each matrix off? The vision tower is included here, as if it were quantized.

# %%
errors = pd.Series({name: off(dequantize_4bit(*quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")), weight)
                    for name, weight in linear.items() if name != "lm_head"}, name="error, %")
errors.groupby(model.tower_of).describe()[["count", "mean", "min", "max"]].round(1)

# %% [markdown]
# About the same everywhere, because every block has its own scale. What that does to the result depends on the model,
# so it is measured: how far off are the logits that choose the tokens of the true completions? `get_memory_footprint`
# counts the bytes of the weights (of NF4 without the scales).

# %%
rows, processor = rows_and_processor(scale, path, train=8 * steps, selection=1, val=pictures)
batch = collate.Collator(processor, PROMPT)(list(rows["val"].select(range(min(8, len(rows["val"]))))))
int8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model.visual", "lm_head"])
ways = {"bf16": None, "int8": int8, "NF4": nf4(torch.bfloat16),
        "NF4, vision tower too": nf4(torch.bfloat16, skip=["lm_head"])}
stored, logits = {}, {}
for way, config in ways.items():
    vlm = load(config, torch.bfloat16, path)
    logits[way] = completion_logits(vlm, batch)
    stored[way] = {"MiB": vlm.get_memory_footprint() / 2**20, "logits, % off": off(logits[way], logits["bf16"])}
pd.DataFrame(stored).T.round(1)

# %% [markdown]
# NF4 costs something, and int8 is much closer. But the adapter is trained *on top of* this rounded base, and learns to
# make up for its errors. Section 7 comes back to that. To quantize the vision tower too saves much in this tiny model;
# at 7B it would save little.
#
# ## 5 · Memory at 7B
#
# For 7B the published shapes are enough. On PyTorch's `meta` device they take no memory:

# %%
seven, stage = seven_b(), RECIPES["r1-llm-only"][0]
quantized = [layer for name, layer in seven.named_modules() if re.fullmatch(stage.lora_targets, name)]
weights, in_nf4 = seven.num_parameters(), sum(layer.weight.numel() for layer in quantized)
lora = sum(64 * (layer.in_features + layer.out_features) for layer in quantized)
gigabytes = {way: (each * in_nf4 + 16 * (weights - in_nf4)) / 8 / 1e9
             for way, each in (("bf16", 16), ("int8", 8), ("NF4", bits[1]["bits a weight"]))}
gigabytes |= {"NF4, and LoRA of rank 64 with Adam": gigabytes["NF4"] + 16 * lora / 1e9,
              "all weights with Adam": 16 * weights / 1e9}
pd.DataFrame({f"GB, {weights / 1e9:.2f} billion weights": gigabytes}).round(1)

# %% [markdown]
# A weight that trains takes 16 bytes: weight, gradient and Adam's two moments in fp32. To train all weights takes
# several GPUs, before any activation. The row above that one is QLoRA.
#
# ## 6 · LoRA's rank
#
# A layer's adapter has $r\,(\text{inputs} + \text{outputs})$ weights, so the number of trainable weights grows in
# proportion to the rank. What does a higher rank bring? Each rank trains for the same few steps on the same pictures,
# on the NF4 base, with $\alpha = 2r$, so that $\alpha / r$ stays the same.

# %%
truth, scratch = data.truth_rows(rows["val"]), Path(tempfile.mkdtemp())


def train(rank):
    """LoRA of `rank` on the language model of the NF4 base."""
    set_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=stage.lora_targets, task_type="CAUSAL_LM")
    tuned = get_peft_model(load(nf4(), path=path), lora)
    rate = stage.learning_rate[scale]
    trainer_for(tuned, rows["train"], processor, scratch, max_steps=steps, learning_rate=rate).train()
    return tuned


# %%
def predicted(vlm, name):
    """The model's predictions for the pictures of val, and their score."""
    lines = predict.predict(vlm, processor, rows["val"], PROMPT, scratch / f"{name}.jsonl", key=name, do_sample=False,
                            batch_size=20, max_new_tokens=64)
    return lines, evaluate.score(truth, lines)


# %%
scores, table = {}, {}
for rank in ranks:
    tuned = train(rank)
    trainable, _ = tuned.get_nb_trainable_parameters()
    scores[rank] = predicted(tuned, f"rank-{rank}")[1]
    gain = evaluate.paired_bootstrap(scores[rank]["per_picture"], scores[ranks[0]]["per_picture"])["difference"]
    table[f"rank {rank}"] = {"trainable weights": f"{trainable:,}",
                             "mean IoU": evaluate.with_interval(scores[rank]["summary"]["mean_iou"]),
                             f"minus rank {ranks[0]}": evaluate.with_interval(gain)}
tuned.save_pretrained(scratch / "adapter")  # the last one is merged below
pd.DataFrame(table).T

# %% [markdown]
# The last column is the difference on the same pictures, with its 95 % interval. Mind what this compares: so short a
# training rewards what learns *fast*. Where each rank ends up is another question; train each to the end and compare:
#
# ```sh
# make run RECIPE=r1-llm-only SCALE=tiny
# make run RECIPE=r1-llm-only SCALE=tiny ARGS='-p lora_rank 2 -p run_name rank-2'
# make compare A=r1-llm-only B=rank-2
# ```
#
# ## 7 · Merging: which boxes move?
#
# To serve one plain model, the adapter has to go *into* the weights. Into which? Call the base $W$ and its NF4 rounding
# $W + e$. The adapter was trained on $W + e + BA$.
#
# | merged into | gives | compared with training |
# |---|---|---|
# | NF4 itself | round($W + e + BA$) | rounded again: $W + e$ lies *on* the levels, a small $BA$ may round back |
# | the dequantized NF4 weights, in 16 bits | $W + e + BA$ | the same, up to rounding in bf16 |
# | the full-precision base | $W + BA$ | $e$ is gone, and $BA$ had learned around it |

# %%
bases = {"NF4": lambda: load(nf4(), path=path),
         "dequantized": lambda: load(nf4(), path=path).dequantize().float(),
         "full precision": lambda: load(dtype=torch.float32, path=path)}
trained = model.load_adapter(load(nf4(), path=path), scratch / "adapter")
before, score = predicted(trained, "as-trained")
exact, table, lines = completion_logits(trained, batch), {}, {}
for kind, base in bases.items():
    merged = model.load_adapter(base(), scratch / "adapter").merge_and_unload()
    merged = merged if kind == "NF4" else merged.to(torch.bfloat16)  # as it is served
    lines[kind], scored = predicted(merged, kind)
    change = evaluate.paired_bootstrap(scored["per_picture"], score["per_picture"])["difference"]
    same = sum(a["boxes"] == b["boxes"] for a, b in zip(before, lines[kind], strict=True))
    table[kind] = {"logits, % off": round(off(completion_logits(merged, batch), exact), 1),
                   "same boxes": f"{same} of {len(truth)}", "mean IoU, change": evaluate.with_interval(change)}
pd.DataFrame(table).T.rename_axis("merged into")

# %% [markdown]
# * **NF4** loses most of a small adapter. The weights were on the levels, and a change of less than half a step to the
#   next level is rounded away.
# * **Dequantized** keeps all of it, on the base that it was trained on. This is the pipeline's default.
# * **Full precision** keeps all of it too, but on a base that the adapter was not trained on.
#
# A box that moves is not yet a loss: the last column says whether boxes get worse on average. Below are some boxes as
# trained (above) and merged into NF4 (below):

# %%
plots.before_after(rows["val"].select(range(4)), truth, before, lines["NF4"], title="trained (above), NF4 (below)")

# %% [markdown]
# ## What to remember
#
# * NF4 is sixteen levels and one scale for 64 weights, about 4.1 bits a weight with double quantization.
# * It rounds every matrix by about the same relative error. What that does to the completion has to be measured.
# * Check what was really quantized and what really trains. Both go wrong silently, by names that match nothing.
# * LoRA's memory grows with its rank, and is small beside that of the frozen base.
# * Never merge into 4 bits. Merge into the *dequantized* weights, and compare boxes before and after.
