# %% [markdown]
# # Four bits a weight: NF4, and what trains beside it
#
# QLoRA is two ideas. The frozen base is held in **NF4**, four bits a weight, so that 7B fits one GPU of 24 GiB. What
# trains are **LoRA** adapters, a pair of thin matrices beside each frozen one. Both are small enough to do by hand, so
# that is what this notebook does, and then measures what each costs:
#
# 1. NF4 by hand, equal to bitsandbytes' bit for bit
# 2. Block size and double quantisation: bytes against error
# 3. What is quantised, what must not be, and a skip list that silently skips nothing
# 4. The error of each layer, and what it does to the answer
# 5. Memory, by formula and measured, and computed for 7B
# 6. LoRA's rank, against trainable weights and against IoU
# 7. Merging into NF4, into its dequantised weights, into the full-precision base: which boxes move?

# %% tags=["parameters"]
scale = "tiny"  # 7b: the published model, on a GPU (of about 30 GiB, by arithmetic)
model_id = None  # Hub id or a model's folder; None: that of the scale
dataset_id = None  # None: that of the scale
run = None  # a finished LoRA run whose adapter is merged in part 7, such as r1-llm-only; None: one trained here
ranks = "2,8,32"  # LoRA ranks that are trained here
steps = 40  # of training, for each rank
pictures = 40  # of val, asked for every IoU below
seed = 0

# %%
import re

from helpers import parameters, topic
from helpers.recipes import RECIPES, SCALES

known = {
    "scale": parameters.one_of(*SCALES),
    "model_id": parameters.default(parameters.text("a Hub id, a model's folder, or embedded")),
    "dataset_id": parameters.default(parameters.text("a Hub id, a local folder, or embedded")),
    "run": parameters.default(parameters.text("the name or folder of a finished LoRA run")),
    "ranks": ("LoRA ranks from 1 to 999 such as 8 or 2,8,32",
              lambda value: re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", str(value)) is not None),
    "steps": parameters.whole(1, 10**5), "pictures": parameters.whole(4, 123), "seed": parameters.whole(0, 2**31 - 1),
}  # fmt: skip
parameters.given(globals(), known)
parameters.check({name: globals()[name] for name in known}, known)
ranks = [int(rank) for rank in str(ranks).split(",")]
model_path = topic.model_path(scale, model_id)
if run is not None:
    run_folder, run_base, run_scale = topic.adapter_run(run)
    if run_scale != scale:
        raise parameters.ParameterError(f"run={run!r} was trained at scale={run_scale}, and here scale={scale}.")

# %%
from helpers import runs

runs.quiet_libraries()
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, get_4bit_type
from IPython.display import Markdown, display
from peft import LoraConfig, get_peft_model
from scipy.stats import norm
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from trl import SFTConfig

from helpers import collate, data, evaluate, merge, model, plots, predict, quantisation, sizes, trainer
from helpers.dev import random_7b
from helpers.plots import quantisation as draw

# %%
chosen, prompt = SCALES[scale], "Detect the bounding box of the nutrition table."
budget = {name: chosen[name] for name in ("min_pixels", "max_pixels")}
count = {"train": chosen["batch_size"] * steps, "selection": 1, "val": pictures}
raw = data.load_raw(dataset_id or chosen["dataset_id"], limit=count)
rows = data.prepare(data.clean(raw, data.audit(raw)), **budget)
rows["val"] = rows["val"].select(range(min(pictures, len(rows["val"]))))
truth = data.truth_rows(rows["val"])
processor = Qwen2VLProcessor.from_pretrained(model_path, **budget)
collator = collate.Collator(processor, prompt)
exact = model.load(model_path, dtype=torch.bfloat16, attn_implementation="eager",
                   device_map=model.device_map()).requires_grad_(False).eval()
with torch.device("meta"):  # 7B from its published configuration: its shapes, no memory
    seven = Qwen2VLForConditionalGeneration(random_7b.config(random_7b.PUBLISHED))
linear_7b = sum(inputs * outputs for name, (inputs, outputs) in sizes.linear_layers(seven).items()
                if model.tower_of(name) == "language")
scratch = Path(tempfile.mkdtemp())
print(f"{len(rows['train'])} pictures to train on, {len(rows['val'])} to ask; {linear_7b:,} weights to quantise at 7B")

# %% [markdown]
# ## 1 · NF4 by hand
#
# Take 64 weights in a row (a *block*), divide them by the largest of them, and round each to the nearest of sixteen
# fixed levels. Keep the level's number (4 bits, two to a byte) and the block's largest weight (its *scale*). To get a
# weight back: level × scale. That is all of NF4.

# %%
weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 0.02  # four blocks of 64
levels = get_4bit_type("nf4", device="cpu")  # the sixteen levels, -1 to 1
scales = weight.abs().amax(dim=1, keepdim=True)
codes = ((weight / scales)[..., None] - levels).abs().argmin(-1)  # [4, 64] of 0 to 15
by_hand = levels[codes] * scales
packed_by_hand = (codes.flatten()[::2] * 16 + codes.flatten()[1::2]).to(torch.uint8)

_, packed, state = quantisation.nf4(weight, double=False)
theirs = dequantize_4bit(packed, state)
display(pd.DataFrame({"weight": weight[0, :6], "÷ scale": (weight / scales)[0, :6], "level's number": codes[0, :6],
                      "level": levels[codes[0, :6]], "back": by_hand[0, :6], "bitsandbytes": theirs[0, :6]}).round(4).T)
equal = {"bytes": torch.equal(packed_by_hand, packed.flatten()), "scales": torch.equal(scales.flatten(), state.absmax),
         "values": torch.equal(by_hand, theirs)}
assert all(equal.values()), equal
Markdown(f"All {weight.numel()} weights of the four blocks, by hand and by bitsandbytes: {len(packed)} bytes, "
         f"{len(scales)} scales and every value are **equal**. The largest weight of a block comes back exactly; "
         f"together they are off by {100 * quantisation.relative_error(by_hand, weight):.1f} % (‖back − weight‖ / "
         "‖weight‖, the error of all tables below).")

# %% [markdown]
# **Why these levels?** Weights are about normal, so most of them are near zero. The "NF" is for *normal float*: the
# levels are quantiles of the normal distribution, dense near zero, so that each is used about equally often. One level
# is exactly zero; there are eight above it and seven below. By that recipe they can be computed:

# %%
outer = 0.9677083  # the outermost quantile, chosen by NF4's authors
above, below = (norm.ppf(np.linspace(outer, 0.5, n + 1)[:-1]) for n in (8, 7))
quantiles = np.sort(np.concatenate([above, [0], -below])) / above.max()
names = [name for name in sizes.linear_layers(exact) if model.tower_of(name) == "language"]
largest = max((exact.get_submodule(name).weight.float().cpu() for name in names), key=torch.numel)
blocks = largest.reshape(-1, 64)
scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
display(draw.codebook(scaled[:20000], levels))
even = torch.linspace(-1, 1, 16)
error = {}
for name, sixteen in (("NF4", levels), ("even", even)):
    nearest = sixteen[torch.bucketize(scaled, (sixteen[1:] + sixteen[:-1]) / 2)]
    error[name] = quantisation.relative_error(nearest * blocks.abs().amax(dim=1, keepdim=True), blocks)
used = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).flatten().bincount(minlength=16) / scaled.numel()
Markdown(f"Levels by quantiles and bitsandbytes' differ by at most {np.abs(quantiles - levels.numpy()).max():.0e}. "
         f"On a matrix of this model each level is used {100 * used.min():.1f} to {100 * used.max():.1f} % of the "
         f"time (even use would be 6.25 %), and the error is **{100 * error['NF4']:.1f} %**, against "
         f"{100 * error['even']:.1f} % for sixteen even steps.")

# %% [markdown]
# ## 2 · Block size and double quantisation
#
# Every block carries a scale. Small blocks follow the weights more closely and cost more: an fp32 scale for 64 weights
# is 32 / 64 = half a bit a weight. **Double quantisation** rounds the scales too: their mean is taken off, and 256 of
# them at a time become one byte each with one fp32 scale: 8 / 64 + 32 / (64 · 256) = .127 bit.
# The last column is what `dequantize_4bit` makes of the same bytes on this machine.

# %%
table = []
for block in (64, 128, 256, 512, 1024):
    for double in (False, True):
        rounded, packed, state = quantisation.nf4(largest, block, double)
        own = dequantize_4bit(packed, state)
        scale_bytes = state.absmax.nbytes + (state.state2.absmax.nbytes + state.offset.nbytes if double else 0)
        table.append({"block": block, "double": "yes" if double else "no",
                      "bits a weight, formula": 8 * sizes.nf4_bytes(largest.numel(), block, double) / largest.numel(),
                      "measured": 8 * (packed.nbytes + scale_bytes) / largest.numel(),
                      "error, %": 100 * quantisation.relative_error(rounded, largest),
                      "error by dequantize_4bit, %": 100 * quantisation.relative_error(own, largest)})
table = pd.DataFrame(table)
assert np.allclose(table["bits a weight, formula"], table["measured"])
display(table.round(3))

# %%
_, _, plain = quantisation.nf4(largest, double=False)
_, _, state = quantisation.nf4(largest, double=True)
mean = plain.absmax.mean()
groups = torch.nn.functional.pad(plain.absmax - mean, (0, -len(plain.absmax) % 256)).reshape(-1, 256)
tops = groups.abs().amax(dim=1, keepdim=True)
numbers = ((groups / tops)[..., None] - state.state2.code).abs().argmin(-1).flatten()[: len(plain.absmax)]
again = state.state2.code[state.absmax.long()] * tops.repeat_interleave(256)[: len(plain.absmax)] + state.offset
same = (numbers == state.absmax).float().mean().item()
no, yes = (table[(table.block == 64) & (table.double == answer)].iloc[0] for answer in ("no", "yes"))
coarse = table[(table.block == 1024) & (table.double == "no")].iloc[0]
saved = no["measured"] - yes["measured"]
broken = table[table["error by dequantize_4bit, %"] > 1.2 * table["error, %"]].block.unique().tolist()
back = 100 * quantisation.relative_error(again, plain.absmax)
fault = f"wrong with blocks of {', '.join(map(str, broken))}" if broken else "right for every block size"
Markdown(f"""Double quantisation by hand: the mean of the scales differs by {abs(mean - state.offset):.0e}, and
{100 * same:.0f} % of the bytes are the same; the scales come back to {back:.2f} %. It saves **{saved:.3f} bits** a
weight, {saved / 8 * linear_7b / 2**30:.2f} GiB at 7B, and the error goes from {no['error, %']:.2f} to
{yes['error, %']:.2f} %. Blocks of 1024 would save {no['measured'] - coarse['measured']:.3f} bits and cost
{coarse['error, %'] - no['error, %']:.2f} points of error: rounding the scales is the better bargain.

The last column: bitsandbytes' own unpacking is **{fault}** on this machine. A row of this matrix has
{largest.shape[1]} weights, and on a CPU bitsandbytes 0.50 takes the wrong scales where a row is no whole number of
blocks; the bytes themselves are right. All models here have blocks of 64 and rows that 64 divides: keep it so.""")

# %% [markdown]
# ## 3 · What is quantised, and what must not be
#
# The linear layers of the language model are four fifths of 7B, so they are quantised. The vision tower is not: it is a
# twelfth of the weights, and an error at the very start goes through everything after it. The head is not: it chooses
# the digits. `llm_int8_skip_modules` says so (the name is old; it holds for 4 bits too), **by the names that modules
# have today**. transformers 5 renamed the tower from `visual` to `model.visual`, and a skip list copied from an older
# script now skips nothing there:

# %%
def load(path, how, skip=("model.visual", "lm_head"), dtype=torch.bfloat16):
    """A frozen model in fp32, bf16, int8 or nf4; `skip` names what stays in `dtype`, in which NF4 also computes."""
    quantised = {
        "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip)),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(skip)),
    }
    return model.load(
        path, dtype=torch.float32 if how == "fp32" else dtype, quantization_config=quantised.get(how),
        attn_implementation="eager" if scale == "tiny" else model.attention(), device_map=model.device_map(),
    ).requires_grad_(False).eval()


found = {}
for skip in (["model.visual", "lm_head"], ["visual", "lm_head"], ["model.visual"]):
    vlm = load(model_path, "nf4", skip)
    towers = pd.Series([model.tower_of(name) for name in model.nf4_layers(vlm)]).value_counts()
    try:
        said = f"{len(model.check_precision(vlm, 'nf4'))} layers, as it should be"
    except ValueError as stopped:
        said = str(stopped).partition(":")[0]
    found[str(skip)] = {tower: towers.get(tower, 0) for tower in model.TOWERS} | {"check_precision": said}
    del vlm
    model.free_memory()
pd.set_option("display.max_colwidth", 90)
pd.DataFrame(found).T

# %% [markdown]
# The columns count NF4 layers. Where a list names the tower by its old name, all of its layers are in 4 bits, and
# nothing warns. `check_precision` compares what was really quantised with what should be, and stops a run.
#
# ## 4 · The error of each layer, and of the answer
#
# Rounding error of the weights, and of what comes out of the layer for real inputs (each layer alone, the ones before
# it exact). The vision tower is drawn too, as if it were quantised.

# %%
batch = collator(list(rows["val"].select(range(4))))
on_device = {name: tensor.to(exact.device) for name, tensor in batch.items() if name != "labels"}
errors = quantisation.layer_errors(exact, on_device)
panels = {"vision tower (if it were quantised)": {}, "language model": {}}
for name, error in errors.items():
    block = re.search(r"\.\d+\.", name)
    if block and ".merger." not in name:
        tower = "language model" if model.tower_of(name) == "language" else "vision tower (if it were quantised)"
        panels[tower].setdefault(name[block.end():], []).append(100 * error["outputs"])
display(draw.error_by_layer(panels, "error of the output, %"))
frame = pd.DataFrame(errors).T * 100
worst = frame["outputs"].idxmax()
exact = exact.to("meta")  # from here on only its shapes are needed
wide = [name for name, (inputs, _) in sizes.linear_layers(exact).items() if inputs % 64 and name in errors]
Markdown(f"The weights of all layers are off by {frame['weights'].min():.1f} to {frame['weights'].max():.1f} %, "
         f"nearly the same everywhere: that is NF4's doing. The outputs are off by {frame['outputs'].min():.1f} to "
         f"{frame['outputs'].max():.1f} %, because there it matters how the errors add up over the inputs; the worst "
         f"is `{worst.removeprefix('model.')}`. Layers whose rows are no whole number of blocks (part 2): "
         f"{len(wide)}.")

# %%
bytes_held, answers = {}, {}
right, wrong = ("model.visual", "lm_head"), ("visual", "lm_head")
for how, skip in (("fp32", ()), ("bf16", ()), ("int8", right), ("nf4", right), ("nf4, vision tower too", wrong)):
    if scale == "7b" and how == "fp32":
        continue  # 31 GiB
    vlm = load(model_path, how.partition(",")[0], skip)
    bytes_held[how], answers[how] = sizes.held_bytes(vlm), quantisation.answer_logits(vlm, batch)
    del vlm
    model.free_memory()
reference = next(iter(answers))
table = pd.DataFrame({how: {
    "logits off, %": 100 * quantisation.relative_error(logits, answers[reference]),
    "another first choice, % of tokens":
        100 * (logits.argmax(-1) != answers[reference].argmax(-1)).float().mean().item(),
} for how, logits in answers.items()}).T
display(table.round(2))
nf4_off, trap_off = (table.loc[how, "logits off, %"] for how in ("nf4", "nf4, vision tower too"))
Markdown(f"All against {reference}, on the answers' tokens. NF4 in the language model moves the logits by "
         f"{nf4_off:.1f} %; with the vision tower in NF4 too, by {trap_off:.1f} % ({trap_off / nf4_off:.2f} ×). What "
         "that costs is a matter of the model, so measure it; what it saves at 7B stands in part 5. Either way NF4 "
         "is no free lunch: the adapter is trained *on top of* this rounded base, and learns around its errors. "
         "Part 7 comes back to that.")

# %% [markdown]
# ## 5 · Memory
#
# Bytes of the frozen weights: 4 or 2 a weight in fp32 and bf16; in int8 one a weight and an fp32 scale for each output;
# in NF4 half a byte and the scales of part 2. In the last two only the language model's linear layers are quantised.

# %%
lines = {}
for how, held in bytes_held.items():
    if "," not in how:
        lines[how] = {f"{tower}, formula": n for tower, n in sizes.weight_bytes(exact, how).items()}
        lines[how] |= {f"{tower}, measured": n for tower, n in held.items()}
        assert sizes.weight_bytes(exact, how) == held, how
display((pd.DataFrame(lines).T / 2**20).round(3).add_suffix(" (MiB)"))
gib = {how: {tower: n / 2**30 for tower, n in sizes.weight_bytes(seven, how).items()} for how in sizes.PRECISIONS}
display(draw.memory({f"7B in {how}": row for how, row in gib.items()}, {"24 GiB": 24}))
lora = sizes.lora_weights(seven, RECIPES["r1-llm-only"][0].lora_targets, 64)
weights = sum(parameter.numel() for parameter in seven.parameters())
in_bf16, in_nf4 = (sum(gib[how].values()) for how in ("bf16", "nf4"))
still = 1 - sizes.nf4_bytes(linear_7b) / 2**30 / in_nf4
tower_saves = gib["nf4"]["vision"] * (1 - yes["measured"] / 16)
Markdown(f"Formula and measurement agree to the byte. 7B ({weights / 1e9:.2f} billion weights) takes {in_bf16:.1f} "
         f"GiB in bf16 and **{in_nf4:.1f} GiB** in NF4; {100 * still:.0f} % of that are the parts left in bf16. "
         f"Quantising the tower too would save {tower_saves:.1f} GiB more. Training all weights with Adam in fp32 "
         f"takes 16 bytes each, {16 * weights / 2**30:.0f} GiB before any activation; LoRA at rank 64 takes 16 bytes "
         f"for each of its {lora / 1e6:.0f} million, {16 * lora / 2**30:.1f} GiB. That is QLoRA.")

# %% [markdown]
# ## 6 · LoRA's rank
#
# A layer's adapter has $r\,(\text{inputs} + \text{outputs})$ weights, so trainable weights grow with the rank, exactly
# in proportion. What does rank buy? Each rank trains here for the same few steps on the same pictures (the recipe's r1,
# with $\alpha = 2r$, so that $\alpha / r$ stays the same), in NF4, with the calls of the pipeline.

# %%
stage = RECIPES["r1-llm-only"][0]


def train(rank):
    """LoRA of `rank` on the NF4 base, trained for `steps` steps; the trained model."""
    transformers.set_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=stage.lora_targets, task_type="CAUSAL_LM")
    tuned = get_peft_model(load(model_path, "nf4", dtype=model.compute_dtype()), lora)
    arguments = SFTConfig(
        output_dir=str(scratch / f"rank-{rank}"), max_steps=steps, per_device_train_batch_size=chosen["batch_size"],
        gradient_accumulation_steps=1, learning_rate=stage.learning_rate[scale], lr_scheduler_type="cosine",
        warmup_steps=0.05, bf16=model.compute_dtype() == torch.bfloat16, max_length=None, remove_unused_columns=False,
        gradient_checkpointing=chosen["gradient_checkpointing"], logging_steps=1, save_strategy="no", seed=seed,
        report_to="none", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    sft = trainer.BoxTrainer(tuned, args=arguments, data_collator=collator, train_dataset=rows["train"],
                             processing_class=processor)
    model.trainable_to_fp32(tuned)  # TRL has just cast LoRA to bf16
    model.check_trainable(tuned, stage)
    sft.train()
    return tuned.eval()


def ask(vlm, name):
    """The model's answers for the pictures of val, and their score."""
    lines = predict.predict(vlm, processor, rows["val"], prompt, scratch / f"{name}.jsonl", key=name, do_sample=False,
                            batch_size=min(20, chosen["predict_batch_size"]), max_new_tokens=64)
    return lines, evaluate.score(truth, lines)


# %%
results = {}
for rank in ranks:
    tuned = train(rank)
    lines, scored = ask(tuned, f"rank-{rank}")
    trained = sum(row["trainable"] for row in model.parameters_by_tower(tuned).values())
    results[rank] = {"lines": lines, "score": scored, "weights": trained}
    if rank == ranks[-1]:
        tuned.save_pretrained(scratch / "adapter")
    del tuned
    model.free_memory()
constant = evaluate.constant_predictions(evaluate.best_constant_box(data.truth_rows(rows["train"])), truth)
to_beat = evaluate.score(truth, constant)["summary"]["mean_iou"]["value"]
table = pd.DataFrame({rank: {
    "by formula": f"{sizes.lora_weights(exact, stage.lora_targets, rank):,}",
    "trained here": f"{result['weights']:,}",
    "7B, million": round(sizes.lora_weights(seven, stage.lora_targets, rank) / 1e6, 1),
    "7B with Adam, GiB": round(16 * sizes.lora_weights(seven, stage.lora_targets, rank) / 2**30, 2),
    "mean IoU (95 %)": evaluate.with_interval(result["score"]["summary"]["mean_iou"]),
} for rank, result in results.items()}).T
display(table.rename_axis("rank"))
draw.rank_curve(ranks, [result["score"]["summary"]["mean_iou"] for result in results.values()], to_beat)

# %%
low, high = min(ranks), max(ranks)
gain = evaluate.paired_bootstrap(results[high]["score"]["per_picture"], results[low]["score"]["per_picture"])
gain = gain["difference"]
sure = "The interval is above zero." if (gain["low"] or 0) > 0 else "The interval does not exclude zero."
said = (f"Rank {high} against rank {low} after {steps} steps, in pairs over the same {gain['n']} pictures: "
        f"{evaluate.with_interval(gain)} mean IoU for {high / low:.0f} × the weights. {sure}")
if high == low:
    said = f"Only rank {low} was trained; to compare, give several, such as `ranks=2,8,32`."
Markdown(said + """
Mind what this compares: so few steps reward what learns *fast*, and at one learning rate a higher rank takes larger
steps. It says nothing on where they end. For that, train each to the end and compare them:

```sh
make run RECIPE=r1-llm-only SCALE=tiny
make run RECIPE=r1-llm-only SCALE=tiny ARGS='-p lora_rank 2 -p run_name rank-2'
make compare A=r1-llm-only B=rank-2
```""")

# %% [markdown]
# ## 7 · Merging: which boxes move?
#
# The adapter has to go *into* the weights to serve one plain model. Into which? Call the base $W$ and its NF4 rounding
# $W + e$. Training saw $W + e + BA$.
#
# | merged into | gives | against training |
# |---|---|---|
# | NF4 itself | round($W + e + BA$) | rounded again: $W + e$ lies *on* the levels, a small $BA$ may round back |
# | the dequantised NF4 weights, in 16 bits | $W + e + BA$ | the same, up to rounding in bf16 |
# | the full-precision base | $W + BA$ | $e$ is gone, and $BA$ had learned around it |

# %%
folder, base_path = (run_folder / "adapter", run_base) if run else (scratch / "adapter", model_path)
dtype = torch.float32 if scale == "tiny" else torch.bfloat16


def merged(kind):
    """The adapter merged into one of the three bases; held in bf16 in the end, as it would be served."""
    if kind == "NF4":
        return model.load_adapter(load(base_path, "nf4"), folder).merge_and_unload()
    base = load(base_path, "nf4").dequantize().to(dtype) if kind == "dequantised" else load(base_path, "full").to(dtype)
    return merge.merge_adapter(model.load_adapter(base, folder), batch)[0].to(torch.bfloat16)


fresh = model.load_adapter(load(base_path, "nf4"), folder)  # its bytes are looked at, so it never answers
as_trained = model.load_adapter(load(base_path, "nf4", dtype=model.compute_dtype()), folder)
logits = quantisation.answer_logits(as_trained, batch)
trained_lines, trained_score = ask(as_trained, "as-trained")
del as_trained
compared, table = {}, {}
for kind in ("NF4", "dequantised", "full precision"):
    vlm = merged(kind)
    left = quantisation.adapter_left(fresh, vlm)
    compared[kind], scored = ask(vlm, kind.replace(" ", "-"))
    shifts = quantisation.box_shifts(trained_lines, compared[kind])
    change = evaluate.paired_bootstrap(scored["per_picture"], trained_score["per_picture"])["difference"]
    table[kind] = {
        "adapter left, %": 100 * left,
        "logits off, %": 100 * quantisation.relative_error(quantisation.answer_logits(vlm, batch), logits),
        "same boxes": f"{sum(shifts == 0)} of {len(shifts)}", "median shift, ‰": np.nanmedian(shifts),
        "largest shift, ‰": np.nanmax(shifts), "mean IoU, merged minus as trained": evaluate.with_interval(change)}
    del vlm
    model.free_memory()
table = pd.DataFrame(table).T.rename_axis("merged into")
table.map(lambda value: value if isinstance(value, str) else f"{round(value, 1) + 0:.1f}")

# %%
added = 100 * quantisation.adapter_size(fresh)
half_step = 100 * (levels.diff().min() / 2 / scaled.square().mean().sqrt()).item()
order = table["logits off, %"].astype(float).sort_values().index.tolist()
shifts = np.nan_to_num(quantisation.box_shifts(trained_lines, compared[order[-1]]), nan=1000)
moved = np.argsort(-shifts)[:5].tolist()
display(plots.before_after(rows["val"].select(moved), truth, trained_lines, compared[order[-1]]))
Markdown(f"""Nearest to the model as it was trained: **{order[0]}**, then {order[1]}, then {order[2]} (expected first:
dequantised). As trained, the mean IoU is {evaluate.with_interval(trained_score['summary']['mean_iou'])} on
{len(shifts)} pictures. Above are the {len(moved)} whose boxes move most when merged into {order[-1]}: as trained in the
upper row, merged in the lower one.

* **NF4**: {max(0, table.loc['NF4', 'adapter left, %']):.1f} % of the adapter is left. The weights lay on the levels;
  half a step to the next level is {half_step:.0f} % of a typical weight or more, and LoRA adds {added:.1f} %. What is
  less than half a step rounds back to where it was. An update that is larger against these steps survives better.
* **Dequantised**: {table.loc['dequantised', 'adapter left, %']:.0f} %; what moves is rounding to bf16.
* **Full precision**: {table.loc['full precision', 'adapter left, %']:.0f} %, on a base that the adapter never met.

A shift is not a loss: boxes move to both sides, and the table's last column says whether they get worse on average.""")

# %% [markdown]
# ## What to take along
#
# * NF4 is sixteen levels and one scale for 64 weights: 4.127 bits a weight with double quantisation.
# * It rounds every matrix by about the same relative error; what that does to the answer has to be measured.
# * Check what was really quantised and what really trains. Both fail in silence, by names.
# * LoRA's rank costs memory in proportion, and little of it; the frozen base and the activations are the bill.
# * Never merge into 4 bits. The adapter belongs to the rounded base that it was trained on: merge it into the
#   *dequantised* weights (the pipeline's default, `merge_base="dequantised"`), and compare boxes before and after.
#
# With a finished run's adapter in part 7, from the repository's folder:
#
# ```sh
# make run RECIPE=r1-llm-only SCALE=tiny
# papermill notebooks/06_quantization_and_trainable_params.ipynb out.ipynb --cwd notebooks -p run r1-llm-only
# ```
