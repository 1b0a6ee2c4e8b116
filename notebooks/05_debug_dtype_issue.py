# %% [markdown]
# # Eight bugs that cost days
#
# Most of these bugs stop nothing. The training runs, the loss is a number, the step counter counts, and the result is
# wrong. Here each of them is *made to happen* on a model small enough for a laptop, and then fixed:
#
# **symptom → smallest reproduction → cause → fix.**
#
# `tests/test_bugs.py` checks that each of them still happens. When it no longer does, a library has fixed the bug, and
# its section can go.
#
# | | bug | what you notice |
# |---|---|---|
# | 1 | one tower in two dtypes | `mat1 and mat2 must have the same dtype`, or a worse loss and no error |
# | 2 | `DataParallel` instead of `device_map` | another batch size than you set; image features do not match |
# | 3 | bf16 weights that swallow small steps | the loss falls slowly, most weights never move |
# | 4 | a resume that starts from the base | the step counter goes on, the loss is back at the start |
# | 5 | autocast mistaken for true bf16 | out of memory with `bf16=True`, or an optimizer state that never shrinks |
# | 6 | fp16 | the loss is `nan`, the completion is `!!!!!!` |
# | 7 | an evaluation that shows 0 % | completions with good boxes, none of them counted |
# | 8 | memory that is not given back | the second run in a notebook is out of memory |

# %% tags=["parameters"]
pictures = 8  # in the batch that everything below is tried on
learning_rate = 1e-5  # the small step of bug 3
steps = 40  # of bug 3

# %%
from helpers.topics.opening import opening

opening(globals(), pictures=range(2, 65), learning_rate=(0.0, 1e-4), steps=range(2, 10_001))

# %%
import re
import tempfile
import weakref
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer
from trl import SFTTrainer

from helpers import collate, messages, model, plots, predict, trainer
from helpers.recipes import RECIPES
from helpers.topics import bugs
from helpers.topics.training import PROMPT, load, nf4, rows_and_processor, trainer_for

# %% [markdown]
# Everything below uses one batch of a few pictures, and loads the base model anew for each bug.

# %%
bf16 = torch.bfloat16
pd.set_option("display.max_colwidth", None)
rows, processor = rows_and_processor(train=pictures, selection=1, val=1)
rows, folder = rows["train"], Path(tempfile.mkdtemp())
batch = collate.Collator(processor, PROMPT)(list(rows))
pd.DataFrame({name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in batch.items()}).T

# %% [markdown]
# ## 1 · One tower in two dtypes
#
# **Symptom.** `mat1 and mat2 must have the same dtype`; or, worse, no error at all and a model whose boxes are bad.
#
# The processor returns fp32 pixels, and Qwen2-VL casts them to the dtype of its vision tower. So the first row below
# works. The other rows show where it does not: when *part* of the tower has another dtype, and when the tower was
# quantized by accident, so that its weights are bytes. Code that casts pixels to "the dtype of the weights"
# (`get_dtype()`, as older versions of the model did) then turns the picture into bytes too.

# %%
mixed, wrong = load(dtype=bf16), load(nf4(bf16, skip=["visual", "lm_head"]), bf16)
mixed.model.visual.merger.float()
as_bytes = batch["pixel_values"].to(wrong.model.visual.get_dtype())
print(f"{batch['pixel_values'].unique().numel()} pixel values become {as_bytes.unique().tolist()}")
forward = {"bf16 tower": bugs.outcome(load(dtype=bf16), **batch),
           "bf16 tower, its merger in fp32": bugs.outcome(mixed, **batch),
           "NF4 tower": bugs.outcome(wrong, **batch),
           "NF4 tower, pixels as bytes": bugs.outcome(wrong, **batch | {"pixel_values": as_bytes})}
pd.Series(forward, name="one forward pass").to_frame()

# %% [markdown]
# **Cause.** A matrix product needs one dtype on both sides, and every part of the model has its own. 4-bit weights are
# stored as `uint8`, and casting to that raises no error. The tower was quantized because the skip list above names it
# `visual`, as older versions did; today its name is `model.visual`, and a name that matches nothing is not an error.
#
# **Fix.** Use today's name, and check what was really quantized. Where parts must differ (fp32 weights that train,
# beside bf16 weights that do not), run the forward pass under autocast, as Trainer does with `bf16=True`.

# %%
with torch.autocast("cpu", bf16):
    print("under autocast:  ", bugs.outcome(mixed, **batch))
print("check_precision: ", bugs.outcome(model.check_precision, wrong, "nf4"))

# %% [markdown]
# ## 2 · `DataParallel` instead of `device_map`
#
# **Symptom.** On a machine with two GPUs the batch is twice as large as you set it, or an error says that image
# features and image tokens do not match. On one GPU all is well.
#
# **Cause.** Trainer counts all *visible* GPUs. If the model lies on one of them, Trainer multiplies the batch and wraps
# the model in `nn.DataParallel`, which cuts every tensor in two along its first axis. That is right for text. For
# Qwen2-VL it is wrong, because `pixel_values` has a row for each *patch*, not for each picture.
#
# This notebook needs no GPU, so PyTorch is told that there are two. All the rest is Trainer's own code, with a batch
# size of 4. Then our batch is cut in two as `DataParallel` cuts it, and one half goes through the model.

# %%
places = {"on one device": {"": "cpu"}, "spread over two": {"model.visual": 0, "model.language_model": 1}}
counted = pd.DataFrame({where: bugs.on_two_gpus(load(dtype=bf16), placed, rows, processor, folder, Trainer)
                        for where, placed in places.items()}).T
half = {name: tensor.chunk(2)[0] for name, tensor in batch.items()}
print(f"half: {half['image_grid_thw'].prod(1).sum()} patches in pictures, {len(half['pixel_values'])} in pixels")
print(bugs.outcome(load(dtype=bf16), **half))
counted

# %% [markdown]
# **Fix.** Let one process drive one model. Where it has several GPUs, spread the layers over them
# (`device_map="balanced"`): Trainer then counts one. Or start one process for each GPU (`accelerate launch`,
# `torchrun`). `model.device_map()` chooses between the two.
#
# ## 3 · bf16 weights swallow small steps
#
# **Symptom.** The vision tower trains at a learning rate of 1e-5 and hardly changes. No error, no warning.
#
# **Cause.** A bf16 number has 8 significant bits: near .04 the next one is .0002 away. Adam moves a weight by about the
# learning rate, and a step of less than half that gap is rounded away, *every* time.
#
# Below, AdamW repeats one real gradient of the vision tower. This is the best case, since all batches agree.

# %%
tower = load(dtype=bf16).train()
tower.model.visual.requires_grad_(True)
tower(**batch).loss.backward()
weights = [weight for weight in tower.model.visual.parameters() if weight.grad is not None]
walks = pd.concat({f"weights in {dtype}": bugs.walk(weights, learning_rate, steps, dtype)
                   for dtype in (torch.float32, bf16)}, axis=1)
axes = walks.xs("way", level=1, axis=1).plot(style=["-", "--"], xlabel="steps", ylabel="distance, in learning rates")
plots.finish(axes.figure)

# %%
values = torch.cat([weight.detach().flatten() for weight in weights]).abs()
half_gap = (torch.nextafter(values, torch.full_like(values, torch.inf)) - values).float() / 2
in_fp32, in_bf16 = walks.xs("moved", level=1, axis=1).iloc[-1]
print(f"{(half_gap > learning_rate).float().mean():.1%} of the weights are too coarse for a step of {learning_rate}.\n"
      f"After {steps} steps {in_bf16:.1%} have moved in bf16, {in_fp32:.1%} in fp32.")

# %% [markdown]
# **A library does it too.** PEFT makes LoRA weights in fp32. TRL casts them to bf16 if the base is quantized.
#
# **Fix.** Store in fp32 whatever trains, and check it just before the training starts. LoRA's weights are few, so this
# costs little.

# %%
stage = RECIPES["r1-llm-only"][0]
lora = get_peft_model(load(nf4()), LoraConfig(r=16, target_modules=stage.lora_targets))
weight = next(weight for weight in lora.parameters() if weight.requires_grad)
print("made by PEFT:           ", weight.dtype)
trainer_for(lora, rows, processor, folder, SFTTrainer)
print("after TRL's SFTTrainer: ", weight.dtype)
print("check_trainable:        ", bugs.outcome(model.check_trainable, lora, stage))
model.trainable_to_fp32(lora)
print("after trainable_to_fp32:", weight.dtype)

# %% [markdown]
# ## 4 · A resume that starts from the base
#
# **Symptom.** A training of the vision tower is killed and resumed. It goes on at the right step, and its loss is that
# of the first step.
#
# The reproduction trains two steps, which leaves `checkpoint-2`. A second trainer resumes from it, and the weights that
# it starts with are compared with those of the checkpoint and with those of the base.

# %%
base, begins = dict(load(dtype=bf16).named_parameters()), {}
for kind in (SFTTrainer, trainer.BoxTrainer):
    trained, start = bugs.resumed(kind, lambda: load(dtype=bf16), rows, processor, folder / kind.__name__)
    same = [sum(torch.equal(start[name], other[name].float()) for name in trained) for other in (trained, base)]
    begins[kind.__name__] = dict(zip(("as in the checkpoint", "as in the base"), same, strict=True))
file = load_file(folder / "SFTTrainer" / "checkpoint-2" / "model.safetensors")
print("in Trainer's file:", next(name for name in file if "visual" in name))
print("in the model:     ", next(name for name in base if "visual" in name))
pd.DataFrame(begins).T.rename_axis("tensors that train")

# %% [markdown]
# **Cause.** The names have changed between versions: the tower was `visual` and is `model.visual` now.
# `save_pretrained` writes the *old* names, so that older programs can read the file, and `from_pretrained` translates
# them back. But Trainer resumes with a plain `load_state_dict(strict=False)`, which skips every name that it does not
# find. `load_best_model_at_end` does the same. There is a warning, if the log level shows it.
#
# **Fix.** Save and load what trains under the names that the model has, and refuse a file with any other names. That is
# what `BoxTrainer` does, in the second row.
#
# ## 5 · Autocast is not true bf16
#
# **Symptom.** Out of memory although `bf16=True`; or a run "in mixed precision" that is not.
#
# **Cause.** `bf16=True` casts *inside the matrix products*. It changes no weight: a model loaded in fp32 stays in fp32.
# A model loaded in bf16 stays in bf16, and so do its gradients and Adam's moments, so there are no fp32 master weights,
# whatever the flag says (bug 3). Adam's second moment then cannot shrink: .999 of a bf16 number rounds to that number
# again.

# %%
ways = {"fp32": (torch.float32, False), "fp32 + autocast": (torch.float32, True),
        "bf16 + autocast": (bf16, True), "bf16": (bf16, False)}
pd.DataFrame({way: bugs.one_step(load(dtype=dtype), batch, autocast) for way, (dtype, autocast) in ways.items()}).T

# %% [markdown]
# "bf16 + autocast" stores exactly what "bf16" stores: the flag made no master weights.
#
# **Fix.** What is frozen may be bf16 or NF4. What trains is fp32, and the forward pass runs under autocast: the second
# row, with its 16 bytes a weight (weight, gradient, two moments), paid for the weights that train and for no others.
# `model.check_trainable` checks it.
#
# ## 6 · fp16 gives `nan`
#
# **Symptom.** The loss is `nan`, or a good model writes `!!!!!!`: where all logits are `nan`, the first token wins.
#
# **Cause.** The largest number in fp16 is 65504; bf16 reaches as far as fp32. Large language models have a few very
# large numbers in their residual stream. The tiny model does not, so here its stream is made larger: everything that is
# added to it is multiplied by a factor. Each layer normalizes its input, so the model still computes the same function.

# %%
def in_range(factor, dtype):
    """Loss and first tokens with a residual stream `factor` times as large."""
    vlm = bugs.scale_residual(load(dtype=dtype), factor)
    (line,) = predict.generate_lines(vlm, processor, [rows[0]], PROMPT, {"max_new_tokens": 6, "do_sample": False})
    return {"forward pass": bugs.outcome(vlm, **batch), "first six tokens": line["text"]}


pd.DataFrame({(f"stream × {factor}", name): in_range(factor, dtype) for factor in (1, 2**14)
              for name, dtype in (("fp32", torch.float32), ("bf16", bf16), ("fp16", torch.float16))}).T

# %% [markdown]
# **Fix.** bf16, on hardware that has it; Qwen2-VL was trained in it. Loss scaling does not help, since the *forward*
# pass overflows. And stop at once: the project's trainer ends a training whose loss is not a number.
# `logging_nan_inf_filter` must be off for that, or Trainer logs the last good loss in its place.
#
# ## 7 · The evaluation shows 0 %
#
# **Symptom.** Not one box is counted. Read the completions before you blame the model: here are two other causes.
#
# **Cause A: the end was never trained.** Padding is masked out of the loss. Where the end token is also the padding
# token (`pad_token = eos_token`, a popular line), the end is masked everywhere. Below, the head forgets `<|im_end|>`
# and learns it again, once from the right labels and once from masked ones.

# %%
end = processor.tokenizer.convert_tokens_to_ids(messages.END_OF_TURN)
masked = batch["labels"].masked_fill(batch["input_ids"] == end, collate.IGNORED)  # what pad_token = eos_token does
one_box = re.compile(r"<\|object_ref_start\|>[^<]+<\|object_ref_end\|><\|box_start\|>[\d(),]+<\|box_end\|>")
greedy, table = {"max_new_tokens": 96, "do_sample": False}, {}
for name, labels in (("end token in the labels", batch["labels"]), ("end token masked as padding", masked)):
    learned = bugs.learn_head(load(dtype=torch.float32), batch, labels, end)
    lines = predict.generate_lines(learned, processor, list(rows), PROMPT, greedy)
    table[name] = {"completions that stop": sum(line["stopped"] for line in lines),
                   "one box and nothing else": sum(bool(one_box.fullmatch(line["text"])) for line in lines),
                   "at least one box": sum(bool(line["boxes"]) for line in lines)}
print(f"masked, a completion: {lines[-1]['text'][:200]} …")
print("check_end_token:     ", bugs.outcome(collate.check_end_token, masked, end))
pd.DataFrame(table).T

# %% [markdown]
# An evaluation that expects exactly one box counts none of these. One that takes the first box hides the fault.
#
# **Fix.** Look at the labels, not at the text: `check_end_token` refuses a batch without an end. And count the
# completions that stop (`stopped` in `predictions.jsonl`).
#
# **Cause B: the wrong tokens were stripped.** `skip_special_tokens=True` removes the box tokens too, and a pattern that
# needs them matches nothing.

# %%
lines = predict.generate_lines(load(), processor, list(rows), PROMPT, greedy)
kept = [line["text"] for line in lines]
stripped = [processor.decode(processor.tokenizer.encode(text), skip_special_tokens=True) for text in kept]
print(f"kept:     {kept[0]}\nstripped: {stripped[0]}")
pd.DataFrame({name: {"one box by a strict pattern": sum(bool(one_box.fullmatch(text)) for text in texts),
                     "a box by parse_text": sum(len(messages.parse_text(text).labels) > 0 for text in texts)}
              for name, texts in (("special tokens kept", kept), ("special tokens stripped", stripped))}).T

# %% [markdown]
# **Fix.** `predict` keeps the special tokens; `parse_text` reads a box with or without them, and lists what it
# rejected. Format and parser are in one file, and a test sends boxes there and back.
#
# ## 8 · Memory that is not given back
#
# **Symptom.** `del model`, and the second run in the same notebook is out of memory.
#
# **Cause.** `del` removes a name, not the model. Something else may still refer to it: a trainer and its parts, which
# refer to each other in a ring; an error, whose traceback keeps every variable of every frame; and `Out`, where IPython
# keeps the value of each cell.

# %%
sft = trainer_for(load(), rows, processor, folder, SFTTrainer)
alive = weakref.ref(sft.model)
del sft
print("a trainer, after del:          ", "still in memory" if alive() else "gone")
model.free_memory()
print("a trainer, after free_memory():", "still in memory" if alive() else "gone")

vlm = load()
alive = weakref.ref(vlm)
try:
    vlm(input_ids=torch.tensor([[10**9]]))  # no such token
except IndexError as error:
    kept = error
del vlm
model.free_memory()
print("an error that is kept, after free_memory():", "still in memory" if alive() else "gone")

# %% [markdown]
# **Fix.** Build what a run needs inside a function and let it go out of scope, or `del` the names; then
# `model.free_memory()` collects the rings and gives PyTorch's cache back to the GPU. Where a cell has shown the model,
# `%xdel model` takes it out of `Out` too. IPython keeps the last error until the next one. `nvidia-smi` shows what
# PyTorch has *reserved*, `torch.cuda.memory_allocated()` what is in use.
#
# Next: [06_quantization_and_trainable_params](06_quantization_and_trainable_params.ipynb), on what NF4 and LoRA cost.
