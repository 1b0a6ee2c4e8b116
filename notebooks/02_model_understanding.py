# %% [markdown]
# # How does Qwen2-VL turn pixels into boxes?
#
# A language model that writes coordinates is an odd thing: it has no box head, no anchors, no pyramid. It reads a
# picture as a strip of tokens and *writes* `(278,495)`. This notebook follows one picture through the model:
#
# 1. What is in an image token?
# 2. How does the model know *where* in the picture a token is?
# 3. Where are the parameters, and where does LoRA attach?
# 4. Where do the time and the memory of a training step go?
# 5. Where does the model look while it writes a coordinate?
#
# ```
# pixels ─▶ patches ─▶ vision tower ─▶ 2 × 2 merged ─▶ image tokens ─┐
#                                                                    ├─▶ language model ─▶ (278,495)
# "Detect the …" ─▶ tokenizer ─▶ embeddings ─▶ text tokens ──────────┘
# ```
#
# It runs on the *tiny base*, which has Qwen2-VL's architecture at a few million parameters. The numbers for 7B are
# computed from its published configuration, without a download.

# %% tags=["parameters"]
scale = "tiny"  # 7b: the published model in bf16, on a GPU of 24 GiB or more
model_id = None  # Hub id or a model's folder, such as a run's merged model; None: that of the scale
dataset_id = None  # None: that of the scale
find = "barcode"  # what the model looks for in part 5; "nutrition table" for 7B, a fine-tuned model, real photos
pictures = 24  # of val, for part 5
picture = 2  # the one that is followed through the model
lora_rank = 16

# %%
from helpers.topics.opening import model_path, opening

opening(globals(), "model_id", "dataset_id", scale=("tiny", "7b"), find="what the model looks for",
        pictures=range(8, 124), picture=range(8), lora_rank=range(1, 4097))

import re

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from matplotlib import pyplot as plt
from peft import LoraConfig, get_peft_model
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLProcessor

from helpers import collate, data, model
from helpers.recipes import RECIPES, SCALES
from helpers.topics import attention, sizes

# %%
path, budget = model_path(scale, model_id), {name: SCALES[scale][name] for name in ("min_pixels", "max_pixels")}
limit = {"train": 1, "selection": 1, "val": pictures}
rows = data.prepare(data.load_splits(dataset_id, limit=limit), **budget)["val"]
processor = Qwen2VLProcessor.from_pretrained(path, **budget)
vlm = model.load(
    path, dtype=torch.bfloat16, device_map=model.device_map(),
    attn_implementation="eager",  # the only one that can show its attention weights
).requires_grad_(False).eval()
seven = sizes.seven_b()  # all of 7B's shapes, none of its weights
vision, text = vlm.config.vision_config, vlm.config.text_config

# %% [markdown]
# ## 1 · Pixels → patches → tokens
#
# The processor resizes a picture so that both sides are multiples of 28 pixels, and cuts it into patches of 14 × 14.
# Patches that will become one token are next to each other in `pixel_values`. The model also reads videos, two frames
# at a time, so a photo counts as two equal frames, and a patch has 3 colours × 2 frames × 14 × 14 numbers.

# %%
collator = collate.Collator(processor, f"Detect the bounding box of the {find}.")
batch = {name: tensor.to(vlm.device) for name, tensor in collator([rows[picture]]).items()}
(_, high, wide), (patches, width) = batch["image_grid_thw"][0].tolist(), batch["pixel_values"].shape
merged, length = (batch["input_ids"] == vlm.config.image_token_id).sum().item(), batch["input_ids"].shape[1]
print(f"{high} × {wide} = {patches} patches of {width} numbers; {high // 2} × {wide // 2} = {merged} image tokens; "
      f"with the text {length} tokens")

# %% [markdown]
# Nothing is lost on the way. Put together again, with the normalization undone, the patches are the picture that the
# model receives, here with the grid of its image tokens (thick) and patches (thin).

# %%
stored = batch["pixel_values"].float().cpu().view(high // 2, wide // 2, 2, 2, 3, 2, 14, 14)
again = stored[..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4).reshape(high * 14, wide * 14, 3)  # of the first frame
again = again * torch.tensor(processor.image_processor.image_std) + torch.tensor(processor.image_processor.image_mean)
plt.figure(figsize=(4, 4 * high / wide))
plt.imshow(again.clamp(0, 1), extent=(0, wide * 14, high * 14, 0))
for side, line in ((14, 0.3), (28, 1)):
    plt.vlines(range(0, wide * 14 + 1, side), 0, high * 14, "white", linewidth=line)
    plt.hlines(range(0, high * 14 + 1, side), 0, wide * 14, "white", linewidth=line)
plt.axis("off")
plt.show()

# %% [markdown]
# Then the vision tower runs. At its end the **merger** makes one token of 2 × 2 patches: four vectors side by side go
# through a small MLP to the width of the language model. The expected shapes follow from the configuration, the
# measured ones come from hooks in a forward pass. PyTorch counts the floating point operations of the same pass.

# %%
tower, language, measured = vlm.model.visual, vlm.model.language_model, {}
expected = {"patch embedding": (tower.patch_embed, (patches, vision.embed_dim)),
            f"{vision.depth} vision blocks": (tower.blocks[-1], (patches, vision.embed_dim)),
            "merger": (tower.merger, (patches // 4, text.hidden_size)),
            f"{text.num_hidden_layers} language layers": (language.layers[-1], (1, length, text.hidden_size)),
            "head": (vlm.lm_head, (1, length, text.vocab_size))}  # fmt: skip
for name, (module, _) in expected.items():
    module.register_forward_hook(lambda module, inputs, out, name=name: measured.update({name: tuple(out.shape)}))
with torch.inference_mode(), FlopCounterMode(display=False) as counter:
    vlm(**batch)
pd.DataFrame({"expected": {name: shape for name, (_, shape) in expected.items()}, "measured": measured})

# %% [markdown]
# Two things to remember. The tower works on **four times** as many rows as there are image tokens, so large pictures
# get expensive there. And the merger is the only bridge: all that the language model will ever know of 28 × 28 pixels
# is in one vector.
#
# ## 2 · Where in the picture is a token? M-RoPE
#
# A strip of tokens has lost its rows and columns. Qwen2-VL gives them back as *positions*: each token has three, for
# time, height and width, and each rotates its own part of every attention head (multimodal rotary embedding). In a text
# token all three are equal.

# %%
positions, _ = vlm.model.get_rope_index(batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"],
                                        image_grid_thw=batch["image_grid_thw"])  # [3, 1, tokens]
for name, line in zip(("time", "height", "width"), positions[:, 0].cpu(), strict=True):
    plt.plot(line, label=name)
plt.gca().set(xlabel="place in the sequence", ylabel="position")
plt.legend()
plt.show()
print(f"{length} tokens use up {positions.max() + 1} positions: a picture takes as many as its longer side has tokens.")

# %% [markdown]
# A head of size $d$ has $d/2$ frequencies, $\theta^{-2i/d}$. The first section of them goes to time, the next to
# height, the last to width. By what angle does the fastest of each turn from one token to the next?

# %%
for name, config, columns in (("this model", text, wide // 2), ("7B", seven.config.text_config, 42)):
    rope, head = config.rope_parameters, config.hidden_size // config.num_attention_heads
    degrees = np.degrees(rope["rope_theta"] ** (-np.arange(0, head, 2) / head))
    _, height, width = (part[0] for part in np.split(degrees, np.cumsum(rope["mrope_section"])[:2]))
    print(f"{name}: {height:.3g}° a row, {width:.3g}° a column, {columns * width:.3g}° across {columns} columns")

# %% [markdown]
# At 7B the rotation along the width is next to nothing. What its language model knows about columns must come mostly
# from the vision tower, whose own 2D rotary embedding gives rows and columns the same frequencies, the fastest of one
# radian a patch. (This follows from the angles; it was not measured.) The tiny base, with fewer tokens across, has
# faster ones.
#
# ## 3 · Where the parameters are, and where LoRA attaches
#
# How many parameters does each part have, here and at 7B, and how many million floating point operations (MFLOP) does
# it spend on the picture above? First in numbers, then in per cent of the whole. One sum is checked by hand.

# %%
flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
weights = pd.DataFrame({"this model": sizes.parameters_by_part(vlm), "7B": sizes.parameters_by_part(seven)})
weights["this model, MFLOP"] = [sum(n for name, n in flops.items() if re.fullmatch(rf"{prefix}(\.\d+)?", name)) / 1e6
                                for prefix in sizes.PARTS.values()]  # fmt: skip
display(weights.map("{:,.0f}".format), (100 * weights / weights.sum()).round(1).add_suffix(", %"))
d, k, i = seven.config.text_config.hidden_size, 4 * 128, seven.config.text_config.intermediate_size
print(f"28 layers of 7B by hand: 28 (2d² + 2dk + d + 2k + 3di + 2d) = {28 * (2*d*d + 2*d*k + d + 2*k + 3*d*i + 2*d):,}")

# %% [markdown]
# Most of 7B is in the linear layers of its language model, so quantizing *them* saves memory. LoRA puts a pair of thin
# matrices beside a linear layer, $W x + \frac{\alpha}{r} B A x$ with $A$ of shape [r, inputs] and $B$ of shape
# [outputs, r], so it adds $r\,(\text{inputs} + \text{outputs})$ weights a layer. The recipes name the layers by one
# regular expression over full module names.

# %%
attached = {}
for recipe in ("r1-llm-only", "r4-joint"):
    targets = RECIPES[recipe][-1].lora_targets
    for name, one in (("this model", vlm), ("7B", seven)):
        by_hand = sizes.lora_weights(one, targets, lora_rank)
        tuned = get_peft_model(one, LoraConfig(r=lora_rank, target_modules=targets))
        trains = {tower: row["trainable"] for tower, row in model.parameters_by_tower(tuned).items()}
        attached[recipe, name] = trains | {"by hand": by_hand}
        tuned.unload()
pd.DataFrame(attached).T.map("{:,}".format)

# %% [markdown]
# A trap: in a *list*, PEFT compares plain endings of names, so a regular expression matches nothing, and nothing warns.
# Below, the vision tower ends up without a trainable weight. `model.check_trainable` stops a run for that.

# %%
tuned = get_peft_model(vlm, LoraConfig(r=lora_rank, target_modules=["q_proj", r"model\.visual\.blocks\.\d+\.mlp\.fc1"]))
table = model.parameters_by_tower(tuned)
tuned.unload()
print({tower: row["trainable"] for tower, row in table.items()})

# %% [markdown]
# ## 4 · Where the time and the memory of a step go
#
# One real training step, forward and backward, for LoRA on the language model (r1) and on both towers (r4). PyTorch's
# profiler times every operation, and a hook adds up the bytes that are kept for the backward pass.

# %%
def step(recipe):
    """Milliseconds by operation and MiB kept for the backward pass, of the second of two training steps."""
    tuned = get_peft_model(vlm, LoraConfig(r=lora_rank, target_modules=RECIPES[recipe][-1].lora_targets))
    model.trainable_to_fp32(tuned)
    for _ in range(2):
        with profile() as profiled, sizes.kept_bytes(tuned) as kept, torch.autocast(vlm.device.type, torch.bfloat16):
            tuned(**step_batch).loss.backward()
    tuned.unload()
    time = "self_cpu_time_total" if vlm.device.type == "cpu" else "self_device_time_total"
    operations = pd.Series({event.key: getattr(event, time) / 1e3 for event in profiled.key_averages()})
    return operations, kept["kept"] / 2**20


some = collator(rows.select(range(8 if scale == "tiny" else 2)))
step_batch = {name: tensor.to(vlm.device) for name, tensor in some.items()}
(r1, r1_kept), (r4, r4_kept) = step("r1-llm-only"), step("r4-joint")
display(pd.DataFrame({"r1, ms": r1, "r4, ms": r4}).nlargest(8, "r4, ms").round(1))
print(f"In all: r1 {r1.sum():.0f} ms and {r1_kept:.0f} MiB, r4 {r4.sum():.0f} ms and {r4_kept:.0f} MiB")

# %% [markdown]
# * In r1 nothing trains in the vision tower or below it. So the gradient stops where the picture enters the language
#   model, and the tower costs its forward pass and keeps nothing. In r4 it keeps its activations, and they are most of
#   a step's memory.
# * The attention weights are pictures × heads × tokens², so they grow with the *square* of the tokens. Training uses a
#   kernel that never stores them (SDPA, flash attention), and where memory is short activation checkpointing, which
#   recomputes activations instead of keeping them.
#
# ## 5 · Where does it look while it writes a coordinate?
#
# A number's first digit is chosen at the token before it, "(" or ",". The attention of *that* token to the image
# tokens, averaged over heads, shows where the model looks for this edge. The tiny base has learned barcodes and logos,
# not nutrition tables, so it looks for a barcode. How much attention falls on the true box? The *lift* is its share of
# the attention over its share of the picture: 1 means that the model looks everywhere alike.

# %%
looks = attention.looks(vlm, processor, rows, find)
mean = np.mean([attention.lift(look) for look in looks], axis=0)  # [layers, 4]
lifts = pd.DataFrame(mean, columns=attention.COORDINATES)
lifts.plot(xlabel="layer of the language model", ylabel="lift of the true box", xticks=lifts.index)
plt.show()
best = lifts.mean(axis=1).idxmax()
print(f"{len(looks)} pictures got a box, with a mean IoU of {np.mean([look.iou for look in looks]):.2f}.\n"
      f"In layer {best} a token of the true box gets {lifts.loc[best].mean():.1f} × the attention of an average one.")

# %% [markdown]
# The best of these pictures, at that layer: truth solid blue, prediction dashed orange. One picture can mislead, so the
# table is a mean over all of them: while a coordinate is written, how far is the centre of attention from each edge, as
# a share of the picture's side?

# %%
display(attention.attention_maps(max(looks, key=lambda look: look.iou), best))
attention.distances(looks, best).style.format("{:.2f}", na_rep="")

# %% [markdown]
# If the numbers on the diagonal are the smallest of their axis (x with x, y with y), the model looks at an edge while
# it writes its coordinate. Attention is a hint, not a proof: after some layers a token can carry more than what was at
# its place in the picture.
#
# ## What to remember
#
# * A picture is `rows × columns` tokens of 28 × 28 pixels; the vision tower computes four patches for each.
# * A position is a rotation, one for each axis. A picture uses up only as many positions as its longer side has tokens.
# * Most of 7B is in the linear layers of the language model: those are what NF4 quantizes and what r1 adapts.
# * A frozen tower costs its forward pass and nothing more; training it costs the activations.
#
# On the real model, from the repository's folder, on a GPU (mind the quotes):
#
# ```sh
# papermill notebooks/02_model_understanding.ipynb out.ipynb --cwd notebooks \
#     -p scale 7b -p find "nutrition table"
# ```
#
# Next: [06_quantization_and_trainable_params](06_quantization_and_trainable_params.ipynb), on what NF4 does to those
# layers.
