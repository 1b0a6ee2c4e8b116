# %% [markdown]
# # How Qwen2-VL turns pixels into boxes
#
# A language model that answers with coordinates is an odd thing: it has no box head, no anchors, no pyramid. It reads a
# picture as a strip of tokens and *writes* `(278,495)`. This notebook follows one picture through the model and
# answers, with numbers measured here:
#
# 1. How many tokens is a picture, and what is in each of them?
# 2. How does the model know *where* a token stands? (M-RoPE)
# 3. Where do the parameters sit, and where does LoRA attach?
# 4. Where do the time and the memory of a training step go?
# 5. Where does the model look while it writes a coordinate?
#
# ```
# pixels ─▶ 14 × 14 patches ─▶ vision tower ─▶ 2 × 2 merged ─▶ image tokens ─┐
#                                                                            ├─▶ language model ─▶ "(278,495)…"
# "Detect the bounding box …" ─▶ tokenizer ─▶ embeddings ─▶ text tokens ─────┘
# ```
#
# It runs on the *tiny base*, which has Qwen2-VL's architecture at a few million parameters; what concerns 7B is
# computed from its published configuration, without a download. The calls are the same at both sizes.

# %% tags=["parameters"]
scale = "tiny"  # 7b: the published model in NF4, on a GPU
model_id = None  # Hub id or a model's folder, such as a run's merged model; None: that of the scale
dataset_id = None  # None: that of the scale
asked_for = "barcode"  # what the model must find in part 5; "nutrition table" for 7B or a fine-tuned model
pictures = 24  # how many pictures of val are asked about
picture = 2  # the one that is followed through the model
lora_rank = 16

# %%
from helpers import parameters, topic
from helpers.recipes import RECIPES, SCALES
from helpers.scenes import THINGS

known = {
    "scale": parameters.one_of(*SCALES),
    "model_id": parameters.default(parameters.text("a Hub id, a model's folder, or embedded")),
    "dataset_id": parameters.default(parameters.text("a Hub id, a local folder, or embedded")),
    "asked_for": parameters.one_of("nutrition table", *THINGS),
    "pictures": parameters.whole(8, 123), "picture": parameters.whole(0, 122), "lora_rank": parameters.whole(1, 4096),
}  # fmt: skip
parameters.given(globals(), known)
parameters.check({name: globals()[name] for name in known}, known)
parameters.check({"picture": picture}, {"picture": parameters.whole(0, pictures - 1)})
model_path = topic.model_path(scale, model_id)
dataset_id = dataset_id or SCALES[scale]["dataset_id"]
if dataset_id != "embedded" and asked_for != "nutrition table":
    raise parameters.ParameterError(f"asked_for={asked_for!r} is known in the embedded pictures alone; with "
                                    f"dataset_id={dataset_id!r} take asked_for='nutrition table'.")

# %%
from helpers import runs

runs.quiet_libraries()
import warnings

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from peft import LoraConfig, get_peft_model
from PIL import ImageOps
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, set_seed

from helpers import boxes, collate, data, model, probe, sizes
from helpers.dev import random_7b
from helpers.plots import architecture

set_seed(0)
budget = {name: SCALES[scale][name] for name in ("min_pixels", "max_pixels")}
raw = data.load_raw(dataset_id, limit={"train": 1, "selection": 1, "val": pictures})
raw = data.clean(raw, data.audit(raw))
rows = data.prepare(raw, **budget)["val"]

# %%
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["model.visual", "lm_head"])
processor = Qwen2VLProcessor.from_pretrained(model_path, **budget)
vlm = model.load(
    model_path,
    dtype=torch.bfloat16,
    quantization_config=nf4 if scale == "7b" else None,
    attn_implementation="eager",  # the only one that can show its attention weights
    device_map=model.device_map(),
).requires_grad_(False).eval()
with torch.device("meta"):  # every module of 7B with its shapes; no weight takes memory
    seven = Qwen2VLForConditionalGeneration(random_7b.config(random_7b.PUBLISHED)).requires_grad_(False)
vision, text, published = vlm.config.vision_config, vlm.config.text_config, seven.config.text_config
here = "tiny" if scale == "tiny" else "loaded"  # what the model of this run is called in the tables
models = {here: vlm, "7B": seven}
print(f"{type(vlm).__name__}, {model_id or SCALES[scale]['model_id']}; {len(rows)} pictures, {dataset_id}")

# %% [markdown]
# ## 1 · Pixels → patches → tokens
#
# The vision tower takes pictures of almost any size, but both sides must be multiples of 28 pixels (two patches of
# 14), and the area must stay within the *pixel budget*. With $n$ pixels allowed, a picture of $h$ by $w$ gets
#
# $$\bar h = 28\,\mathrm{round}(h/28) \quad\text{or, if too large,}\quad
#   \bar h = 28\left\lfloor \frac{h}{28}\sqrt{\frac{n}{h\,w}}\right\rfloor$$
#
# and likewise $\bar w$ (too small a picture is enlarged, rounding up). It then has
# $\bar h / 28 \cdot \bar w / 28$ image tokens. The formula, beside what the processor did:

# %%
def tokens_by_formula(height, width):
    """Image tokens of a picture that is not smaller than the budget's lower bound."""
    beta = (height * width / budget["max_pixels"]) ** 0.5
    if round(height / 28) * round(width / 28) * 28**2 <= budget["max_pixels"]:
        return round(height / 28) * round(width / 28)
    return int(height / beta / 28) * int(width / beta / 28)


measured = []
for shown in (ImageOps.exif_transpose(image) for image in raw["val"][:6]["image"]):
    grid = processor.image_processor(images=[shown], return_tensors="pt")["image_grid_thw"][0].tolist()
    measured.append({"width, px": shown.width, "height, px": shown.height, "patches (time, rows, columns)": grid,
                     "tokens, formula": tokens_by_formula(shown.height, shown.width),
                     "tokens, measured": sizes.image_tokens(grid)})
display(pd.DataFrame(measured))
assert all(line["tokens, formula"] == line["tokens, measured"] for line in measured)

# %% [markdown]
# The budget is a choice between sight and cost: with fewer tokens, each stands for more of the photo. The answer's
# thousandths are finer than the tokens in any case, so the model has to place an edge *inside* a token.
#
# The processor hands the patches over as rows of `pixel_values`, four neighbours one after the other, so that merging
# is a plain reshape later. A still is taken as two equal frames (the model also reads videos, two frames at a time):
# a row holds 3 colours × 2 frames × 14 × 14 pixels = 1176 numbers. Nothing is lost; put together again, it is the
# picture.

# %%
row = rows[min(picture, len(rows) - 1)]
batch = collate.Collator(processor, f"Detect the bounding box of the {asked_for}.")([row])
grid, length = batch["image_grid_thw"][0].tolist(), batch["input_ids"].shape[1]
n, merged, (high, wide) = int(np.prod(grid)), sizes.image_tokens(grid), (grid[1] // 2, grid[2] // 2)
image = row["image"].convert("RGB").resize((wide * 28, high * 28), 3)
display(architecture.patch_grid(image, grid, (high // 2, wide // 2)))

patches = batch["pixel_values"].reshape(high, wide, 2, 2, 3, 2, 14, 14)
again = patches[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, high * 28, wide * 28)
spread, mean = (torch.tensor(values)[:, None, None] for values in
                (processor.image_processor.image_std, processor.image_processor.image_mean))
off = ((again * spread + mean) * 255 - torch.from_numpy(np.array(image)).permute(2, 0, 1)).abs().max().item()
twice = torch.equal(patches[..., 0, :, :], patches[..., 1, :, :])
Markdown(f"{n} patches of {batch['pixel_values'].shape[1]} numbers. Put together again they differ from the picture by "
         f"at most **{off:.2f}** of 255 grey levels; the two frames are equal: **{twice}**.")

# %% [markdown]
# Then the tower runs, and at its end the **merger** makes one token of 2 × 2 patches: four vectors side by side,
# through a small MLP, to the width of the language model. Expected is what the configuration says, measured is what
# hooks saw in a forward pass.

# %%
batch = {name: tensor.to(vlm.device) for name, tensor in batch.items()}
tower, language = vlm.model.visual, vlm.model.language_model
places = {
    "pixel values": (tower.patch_embed, "in", (n, 3 * 2 * 14 * 14)),
    "after the patch embedding": (tower.patch_embed, "out", (n, vision.embed_dim)),
    f"after {vision.depth} blocks": (tower.blocks[-1], "out", (n, vision.embed_dim)),
    "in the merger, 2 × 2 side by side": (tower.merger.mlp, "in", (n // 4, 4 * vision.embed_dim)),
    "image tokens": (tower.merger, "out", (n // 4, text.hidden_size)),
    "language model, image and text": (language.layers[0], "out", (1, length, text.hidden_size)),
    "scores of the next token": (vlm.lm_head, "out", (1, length, text.vocab_size)),
}
seen = probe.shapes(vlm, batch, {name: place[:2] for name, place in places.items()})
table = {name: {"expected": shape, "measured": seen[name]} for name, (_, _, shape) in places.items()}
assert all(line["expected"] == line["measured"] for line in table.values())
pd.DataFrame(table).T

# %% [markdown]
# Two things to keep: the tower works on **four times** as many rows as there are image tokens, so it is where large
# pictures get expensive. And the merger is the only bridge: all that the language model will ever know of 28 × 28
# pixels is in one vector.
#
# ## 2 · Where does a token stand? M-RoPE
#
# A strip of tokens has lost its rows and columns. Qwen2-VL gives them back by *position*: each token has three, for
# time, height and width, and each of them rotates its own part of every attention head (multimodal rotary embedding).
# A text token has all three equal, so for text it is the usual rotary embedding.

# %%
positions, _ = vlm.model.get_rope_index(batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"],
                                        image_grid_thw=batch["image_grid_thw"])
is_image = batch["input_ids"][0] == vlm.config.image_token_id
display(architecture.positions_on_picture(image, positions[:, 0].cpu(), is_image.cpu(), (high, wide)))
first, last = is_image.nonzero().flatten()[[0, -1]].tolist()
start, after = positions[0, 0, first].item(), positions[0, 0, last + 1].item()
Markdown(f"The picture has **{merged}** tokens and uses up **{after - start}** positions: text goes on at start + "
         f"max(rows, columns) = {start} + {max(high, wide)} = {start + max(high, wide)}, measured **{after}**. So even "
         "a large picture does not push the question far away from the text before it.")

# %% [markdown]
# Which frequencies an axis gets matters. A head of size $d$ has $d/2$ of them, $\theta^{-2i/d}$; the first section goes
# to time, the next to height, the last to width. The table shows by what angle the fastest and the slowest one turn
# from a token to its neighbour, and how far the fastest turns across a whole picture (7B: 30 × 42 tokens).

# %%
turns = {}
for name, config, shape in ((here, text, (1, high, wide)), ("7B", published, (1, 30, 42))):
    angles = sizes.rope_angles(config.rope_parameters, config.hidden_size // config.num_attention_heads)
    for (axis, degrees), side in zip(angles.items(), shape, strict=True):
        turns[name, axis] = {"frequencies": len(degrees), "fastest, °/token": degrees[0],
                             "slowest, °/token": degrees[-1], "fastest across the picture, °": degrees[0] * (side - 1)}
display(pd.DataFrame(turns).T.astype({"frequencies": int}).map(lambda value: f"{value:.3g}"))
across = turns["7B", "width"]["fastest across the picture, °"]
Markdown(f"A surprise: at 7B the width axis turns by **{across:.2f}°** from one side of the picture to the other, next "
         "to nothing. What the 7B language model knows about columns must then come mostly from the vision tower, "
         "whose own 2D rotary embedding gives rows and columns the same frequencies, the fastest a radian (57°) a "
         "patch. That is read off the angles, not measured. The tiny base, with far fewer tokens across, was given "
         f"faster ones: θ = {text.rope_parameters['rope_theta']:g}, sections {text.rope_parameters['mrope_section']} "
         f"here; {published.rope_parameters['rope_theta']:,.0f}, {published.rope_parameters['mrope_section']} at 7B.")

# %% [markdown]
# ## 3 · Where the parameters are, and where LoRA attaches
#
# 7B was built above on PyTorch's *meta device* from its published configuration, so its weights can be counted.

# %%
counts = {name: sizes.parameters_by_part(one) for name, one in models.items()}
display(pd.DataFrame(counts).map("{:,}".format))
display(architecture.shares({
    f"{name}, million weights": {part: n / 1e6 for part, n in parts.items() if "norm" not in part}
    for name, parts in counts.items()}))
d, k, i = published.hidden_size, 4 * 128, published.intermediate_size
by_hand = 28 * (2 * d * d + 2 * d * k + (d + 2 * k) + 3 * d * i + 2 * d)
towers = {name: 100 * sum(n for part, n in parts.items() if "vision" in part) / sum(parts.values())
          for name, parts in counts.items()}
Markdown(f"28 language layers of 7B by hand, each 2d² + 2dk + (d + 2k) + 3di + 2d with d = {d}, k = {k}, i = {i}: "
         f"{by_hand:,}; counted: **{counts['7B']['language: layers']:,}**. They are "
         f"{100 * by_hand / sum(counts['7B'].values()):.0f} % of 7B: quantising *them* saves the memory. The vision "
         f"tower is {towers['7B']:.0f} % there and {towers[here]:.0f} % in the model above it, so timings of the two "
         "do not compare.")

# %% [markdown]
# LoRA puts a pair of thin matrices beside a linear layer, $W x + \frac{\alpha}{r} B A x$ with $A$ of shape [r, inputs]
# and $B$ of shape [outputs, r]: $r\,(\text{inputs} + \text{outputs})$ weights a layer. The recipes attach it by one
# regular expression over full module names:

# %%
targets = RECIPES["r4-joint"][-1].lora_targets
print(targets.replace("|model", "|\nmodel"))
kinds = {}
for name, one in models.items():
    for layer, (inputs, outputs) in sizes.linear_layers(one, targets).items():
        line = kinds.setdefault(next(iter(model.layer_kinds([layer]))).removeprefix("model."), {})
        line[f"{name}: layers"] = line.get(f"{name}: layers", 0) + 1
        line[f"{name}: one layer"] = f"{inputs} → {outputs}"
        line[f"{name}: LoRA"] = line.get(f"{name}: LoRA", 0) + lora_rank * (inputs + outputs)
display(pd.DataFrame(kinds).T)

# %%
attached = []
for recipe in ("r1-llm-only", "r4-joint"):
    pattern = RECIPES[recipe][-1].lora_targets
    for name, one in models.items():
        formula = sizes.lora_weights(one, pattern, lora_rank)
        tuned = get_peft_model(one, LoraConfig(r=lora_rank, target_modules=pattern, task_type="CAUSAL_LM"))
        table = model.parameters_by_tower(tuned)
        trains = {tower: row["trainable"] for tower, row in table.items()}
        share = sum(trains.values()) / sum(row["total"] for row in table.values())
        attached.append({"recipe": recipe, "model": name, **trains, "by formula": formula,
                         "counted": sum(trains.values()), "of all, %": round(100 * share, 2)})
        tuned.unload()
display(pd.DataFrame(attached))
assert all(line["by formula"] == line["counted"] for line in attached)

wrong = ["q_proj", r"model\.visual\.blocks\.\d+\.mlp\.fc1"]  # a list: compared with the ends of names, as plain text
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    tuned = get_peft_model(vlm, LoraConfig(r=lora_rank, target_modules=wrong))
trains = {tower: row["trainable"] for tower, row in model.parameters_by_tower(tuned).items()}
tuned.unload()
said = [warning for warning in warned if "target" in str(warning.message)]
Markdown(f"Watch the columns of the towers. `target_modules=[\"{wrong[0]}\", r\"{wrong[1]}\"]`, a *list*, "
         f"trains {trains['language']:,} weights of the language model and **{trains['vision']:,}** of the vision "
         f"tower, with no error and {len(said)} warnings about it: inside a list a regular expression matches nothing. "
         "`model.check_trainable` stops a run for that.")

# %% [markdown]
# ## 4 · Where the time and the memory of a step go
#
# First the arithmetic: a linear layer takes two operations a weight for each row that it sees, attention $4 S^2 d$ a
# layer for $S$ rows of width $d$. PyTorch can count as it runs; the two agree. Then a real training step, forward and
# backward, for LoRA on the language model (r1) and on both towers (r4): hooks time each part and note what it keeps in
# memory for the backward pass.

# %%
with torch.inference_mode(), FlopCounterMode(display=False) as counter:
    vlm(**batch)
counted = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
formula = sizes.forward_flops(vlm, grid, length)
print(f"one picture forward: {sum(formula.values()):,} operations by formula, {counted['']:,} counted")

few = rows.select(range(min(8 if scale == "tiny" else 2, len(rows))))
step = {name: tensor.to(vlm.device) for name, tensor in collate.Collator(processor, "Where?")(few).items()}
costs = {}
for recipe in ("r1-llm-only", "r4-joint"):
    tuned = get_peft_model(vlm, LoraConfig(r=lora_rank, target_modules=RECIPES[recipe][-1].lora_targets))
    model.trainable_to_fp32(tuned)
    costs[recipe] = probe.step_costs(tuned, step)
    tuned.unload()
units = {"forward": ("ms", 1e3), "backward": ("ms", 1e3), "kept": ("MiB", 2**-20)}
pd.concat({recipe: pd.DataFrame({f"{kind}, {unit}": {part: cost[kind] * by for part, cost in parts.items()}
                                 for kind, (unit, by) in units.items()}) for recipe, parts in costs.items()},
          axis=1).round(1)

# %%
adam = attached[-2]["counted"] * 16 / 2**20  # weight, gradient and two moments in fp32
r1, r4 = (pd.DataFrame(costs[recipe]).sum(axis=1) for recipe in costs)
tower_kept = sum(costs["r1-llm-only"][part]["kept"] for part in probe.PARTS if part.startswith("vision")) / 2**20
scores = len(few) * text.num_attention_heads * step["input_ids"].shape[1] ** 2 * 2 * text.num_hidden_layers / 2**20
Markdown(f"""* In r1 the vision tower keeps **{tower_kept:.1f} MiB** and has no backward pass: nothing in it or below it
  trains, so the gradient stops where the picture enters the language model.
* A step of r4 takes **{(r4.forward + r4.backward) / (r1.forward + r1.backward):.1f} ×** the time of r1's and keeps
  **{r4.kept / r1.kept:.1f} ×** the memory: {r4.kept / 2**20:,.0f} MiB, beside {adam:.0f} MiB for LoRA's weights,
  gradients and Adam's two moments. Activations are what a step's memory is made of.
* Each copy of the language model's attention weights (pictures × heads × tokens² × 2 bytes × layers) is
  {scores:.0f} MiB of that and grows with the *square* of the tokens. At 7B a kernel that never writes them down (SDPA,
  flash attention) is used, and gradient checkpointing, which computes activations twice instead of keeping them.""")

# %% [markdown]
# Does each part take the time that its operations suggest?

# %%
ms = {part: 1e3 * costs["r1-llm-only"][part]["forward"] for part in formula}
step_flops = [sizes.forward_flops(vlm, one, step["input_ids"].shape[1]) for one in step["image_grid_thw"].tolist()]
gflop = {part: sum(one[part] for one in step_flops) / 1e9 for part in formula}
big = {part: n / 1e12 for part, n in sizes.forward_flops(seven, (1, 60, 84), 1260 + 60).items()}
display(architecture.shares({f"{here}, forward, GFLOP": gflop, f"{here}, forward, ms": ms,
                             "7B, 1260 image tokens, TFLOP": big}))
embed, inputs = tower.patch_embed, step["pixel_values"].to(vlm.dtype)
matrix = embed.proj.weight.flatten(1).T  # [1176, width]: the kernel is as large as its step, so it is a plain matrix
with torch.inference_mode():
    off = ((embed(inputs) - inputs @ matrix).abs().max() / (inputs @ matrix).abs().max()).item()
    timers = [Timer(code, globals={"embed": embed, "inputs": inputs, "matrix": matrix})
              for code in ("embed(inputs)", "inputs @ matrix")]
    convolution, product = (timer.blocked_autorange(min_run_time=0.5).median for timer in timers)
share = {name: 100 * parts["vision: patch embedding"] / sum(parts.values()) for name, parts in
         (("ops", gflop), ("ms", ms), ("7B", big))}
Markdown(f"The patch embedding has {share['ops']:.0f} % of the operations and took {share['ms']:.0f} % of the time. "
         "transformers writes it as a 3D convolution whose kernel is as large as its step, which is a plain matrix "
         f"product. Written as one it gives the same numbers (to {100 * off:.2f} % of the largest), and the "
         f"convolution takes **{convolution / product:.1f} ×** its time on this machine. At 7B it has "
         f"{share['7B']:.2f} % of the operations.")

# %% [markdown]
# ## 5 · Where does it look while it writes a coordinate?
#
# A number's first digit is chosen at the token before it, "(" or ",". The attention of *that* token to the image
# tokens, averaged over heads, shows where the model looks for this edge. The tiny base was never taught nutrition
# tables, but barcodes and logos, so it is asked for one. (A run's merged model can be asked for its table:
# `-p model_id ../runs/…-merged -p asked_for "nutrition table"`.)
#
# How much attention falls on the true box? A *lift* of 1 is that of a model which looks everywhere alike.

# %%
question = f"Detect the bounding box of the {asked_for}."
shown, found = 0, []  # found: (IoU, look, the true box nearest to the answer, row)
for one in rows:
    truth = topic.boxes_of(one, asked_for)
    shown += len(truth) > 0
    look = probe.look(vlm, processor, one["image"], question) if len(truth) else None
    if look is not None and len(look.boxes):
        iou = boxes.pairwise_iou(truth, look.boxes[:1])[:, 0]
        found.append((iou.max(), look, truth[iou.argmax()], one))
if not found:
    raise parameters.ParameterError(f"asked_for={asked_for!r} stands on {shown} of {len(rows)} pictures, and none got "
                                    "a box: ask for another thing, or raise pictures.")
lifts = np.mean([probe.lift(look, box) for _, look, box, _ in found], axis=0)  # [layers, 4]
best = int(lifts.mean(1).argmax())
to_picture = np.mean([look.maps[best].sum((1, 2)).mean() for _, look, _, _ in found])
display(architecture.by_layer({name: lifts[:, i] for i, name in enumerate(probe.COORDINATES)},
                              "layer of the language model", "lift of the true box", level=1))
Markdown(f"{shown} of {len(rows)} pictures show a {asked_for}; {len(found)} got a box, mean IoU "
         f"{np.mean([iou for iou, *_ in found]):.2f}. Layer **{best}** looks hardest: a token of the true box gets "
         f"**{lifts[best].mean():.1f} ×** the attention of an average one; in layer 0 it is {lifts[0].mean():.1f} ×. "
         f"The picture gets {100 * to_picture:.0f} % of that layer's attention, the text the rest.")

# %% [markdown]
# The picture that was answered best, at that layer: truth solid blue, answer dashed orange, brighter is more attention,
# in the title the most that one token gets. One picture can flatter, so the table goes over all of them: how far is the
# centre of attention, while a coordinate is written, from each edge that was then written?

# %%
_, look, box, one = max(found, key=lambda answer: answer[0])
maps = dict(zip(probe.COORDINATES, look.maps[best], strict=True))
display(architecture.attention_maps(one["image"].convert("RGB"), maps, box, look.boxes))
far = pd.DataFrame(probe.edge_distances([look for _, look, _, _ in found], best)).T
display(far.rename(index="while writing {}".format).rename(columns="from {}".format).round(2))
opposite = {"x0": "x1", "y0": "y1", "x1": "x0", "y1": "y0"}
own = [name for name, other in opposite.items() if far.loc[name, name] < far.loc[name, other]]
Markdown(f"The answer was `{look.text}`. Nearer to its own edge than to the opposite one: "
         f"**{', '.join(own) or 'none'}** ({len(own)} of 4, n = {len(found)}). Attention is a trace, not a proof: "
         "after some layers, what a token carries need not be what stood at its place in the picture.")

# %% [markdown]
# ## What to take along
#
# * A picture is `rows × columns` tokens of 28 × 28 pixels, by the pixel budget; the tower pays four rows for each.
# * Position is rotation, per axis. A picture uses up only as many positions as its longer side has tokens.
# * Four fifths of 7B are linear layers of the language model: those are what NF4 holds and what r1 adapts.
# * A frozen tower costs its forward pass and nothing more; training it costs the activations.
# * Where a coordinate was read from can be looked at, layer by layer, and should be averaged over pictures.
#
# On the real model, on a GPU, from the repository's folder (`asked_for` has a space: mind the quotes):
#
# ```sh
# papermill notebooks/02_model_understanding.ipynb out.ipynb --cwd notebooks -p scale 7b -p asked_for "nutrition table"
# ```
#
# Next: [06_quantization_and_trainable_params](06_quantization_and_trainable_params.ipynb), on what NF4 does to those
# layers.
