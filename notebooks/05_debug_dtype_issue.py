# %% [markdown]
# # Eight bugs that cost days
#
# Most of them stop nothing. The training runs, the loss is a number, the step counter counts, and the result is wrong.
# Each is *made to happen* here, on a model small enough for a laptop, and then repaired:
#
# **symptom → smallest reproduction → cause → fix → check.**
#
# Every number in the text below the cells is measured by the cell. A reproduction that no longer works stops this
# notebook: then a library has repaired the bug, and its section can go. The last table lists all of them.
#
# | | bug | what you see |
# |---|---|---|
# | 1 | one tower in two dtypes | `mat1 and mat2 must have the same dtype`, or a worse loss without a word |
# | 2 | `DataParallel` against `device_map` | another batch size than you set; image features do not match |
# | 3 | bf16 weights that swallow small steps | the loss falls slowly, most weights never move |
# | 4 | a resume that starts from the base | the step counter goes on, the loss is back at the start |
# | 5 | autocast against true bf16 | out of memory with `bf16=True`, or an optimizer that forgets nothing |
# | 6 | fp16 | the loss is `nan`, the answer is `!!!!!!` |
# | 7 | an evaluation that shows 0 % | answers of good boxes, none counted |
# | 8 | memory that is not given back | the second run in a notebook is out of memory |

# %% tags=["parameters"]
model_id = "embedded"  # or the folder or Hub id of a Qwen2-VL that this machine can hold several times
dataset_id = "embedded"  # or a Hub id, a local folder or file
pictures = 8  # how many are asked about and trained on
learning_rate = 1e-5  # the small step of bug 3
steps = 40  # of bug 3's walk
seed = 0

# %%
import re
from pathlib import Path

from helpers import parameters

known = {
    "model_id": ("embedded, a folder that holds a model, or a Hub id", lambda value: isinstance(value, str) and (
        re.fullmatch(r"embedded|[\w-]+/[\w.-]+", value) or (Path(value) / "config.json").is_file())),
    "dataset_id": parameters.text("embedded, a local folder or file, or a Hub id"),
    "pictures": parameters.whole(2, 64), "learning_rate": parameters.number(0, 1e-4),
    "steps": parameters.whole(2, 10_000), "seed": parameters.whole(0, 2**31 - 1),
}  # fmt: skip
parameters.given(globals(), known)
parameters.check({name: globals()[name] for name in known}, known)

# %%
from helpers import runs

runs.quiet_libraries()
import tempfile
from unittest.mock import patch

import pandas as pd
import torch
from IPython.display import display
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, Qwen2VLProcessor, Trainer, set_seed
from trl import SFTTrainer

from helpers import bugs, collate, data, messages, model, predict, settings, trainer
from helpers.plots.precision import lost_updates
from helpers.recipes import RECIPES, SCALES

set_seed(seed)
pd.set_option("display.max_colwidth", None)

# %%
# a few pictures as one batch; the base, loaded anew for each bug; `seen` keeps what was found
path = str(settings.TINY_BASE) if model_id == "embedded" else model_id
budget = SCALES["tiny"]["min_pixels"], SCALES["tiny"]["max_pixels"]
processor = Qwen2VLProcessor.from_pretrained(path, min_pixels=budget[0], max_pixels=budget[1])
raw = data.load_raw(dataset_id, limit={"train": pictures, "selection": 1, "val": 1})
rows = data.prepare(data.clean(raw, data.audit(raw)), *budget)["train"]
collator = collate.Collator(processor, "Detect the bounding box of the nutrition table.")
batch = collator(list(rows))
material = {"data_collator": collator, "train_dataset": rows, "processing_class": processor}
folder, seen = Path(tempfile.mkdtemp()), {}


def load(dtype=torch.bfloat16, skip=None):
    """The base on the CPU; `skip`: the modules that stay out of NF4 (None: no NF4)."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                             llm_int8_skip_modules=skip)
    return model.load(path, dtype=dtype, quantization_config=nf4 if skip else None, attn_implementation="eager",
                      device_map={"": "cpu"}).requires_grad_(False)


def saw(number, bug, happened, repaired):
    """Note a bug; stop where it did not happen, or its repair failed."""
    assert happened, f"bug {number} ({bug}) did not happen: a library has repaired it, and this section can go."
    assert repaired, f"bug {number} ({bug}) happened, and the fix did not work."
    seen[number] = {"bug": bug, "happened": happened, "repaired": repaired}


{name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in batch.items()}

# %% [markdown]
# ## 1 · One tower in two dtypes
#
# **Symptom.** `mat1 and mat2 must have the same dtype`; or, worse, nothing at all and a model that sees badly.
#
# The processor gives fp32 pixels. Today's Qwen2-VL casts them itself, to the dtype of the tower. The first row below
# shows that this works; the others show where it does not: a tower of which a *part* is held otherwise, and a tower
# that was quantised by accident, whose weights are bytes. Code that casts pixels to "the dtype of the weights"
# (`get_dtype()`, as older versions of the model did) turns the picture into bytes too.

# %%
whole, part = load(), load()
part.model.visual.merger.float()
bytes_tower = load(skip=["visual", "lm_head"])  # an old name: it keeps nothing out of NF4
as_bytes = batch | {"pixel_values": batch["pixel_values"].to(bytes_tower.model.visual.get_dtype())}
forward = {
    "bf16 tower, fp32 pixels": bugs.outcome(lambda: whole(**batch).loss),
    "bf16 tower, its merger in fp32": bugs.outcome(lambda: part(**batch).loss),
    "NF4 tower, fp32 pixels": bugs.outcome(lambda: bytes_tower(**batch).loss),
    "NF4 tower, pixels in the dtype of its weights": bugs.outcome(lambda: bytes_tower(**as_bytes).loss),
}
display(pd.Series(forward, name="one forward pass").to_frame())
print(f"The last row raises no error: of {batch['pixel_values'].unique().numel()} pixel values "
      f"{as_bytes['pixel_values'].unique().numel()} are left, {as_bytes['pixel_values'].unique().tolist()}, and the "
      f"{forward['NF4 tower, fp32 pixels']} is now a {forward['NF4 tower, pixels in the dtype of its weights']}.")

# %% [markdown]
# **Cause.** A matrix product wants one dtype on both sides, and each part of the model brings its own. 4-bit weights
# are stored as `uint8`, and a cast to that is legal.
#
# **Fix.** Keep the tower out of NF4, by the name that its module has *today* (`model.visual`), and check what was
# really quantised. Where parts must differ (fp32 weights that train beside bf16 ones that do not), run the forward
# pass under autocast, as Trainer does with `bf16=True`.

# %%
with torch.autocast("cpu", torch.bfloat16):
    mixed = bugs.outcome(lambda: part(**batch).loss)
try:
    caught = bool(model.check_precision(bytes_tower, "nf4")) and "no complaint"
except ValueError as error:
    caught = str(error)
right = load(skip=["model.visual", "lm_head"])
print(f"autocast over the two dtypes:  {mixed}\ncheck_precision, wrong name:   {caught}\n"
      f"check_precision, right name:   {len(model.check_precision(right, 'nf4'))} NF4 layers, the tower holds "
      f"{model.dtypes_by_tower(right)['vision']}, {bugs.outcome(lambda: right(**batch).loss)}")
broken = list(forward.values())
saw(1, "one tower in two dtypes", "Error" in broken[1] and "loss" in broken[3] and broken[3] != broken[2],
    "loss" in mixed and "should not be" in caught)

# %% [markdown]
# ## 2 · `DataParallel` against `device_map`
#
# **Symptom.** On a machine with two GPUs the batch is twice what you set, or the error is about image features that do
# not match, or about tensors on different devices. On one GPU all is well.
#
# **Cause.** Trainer counts the GPUs that it *sees*. If a model lies on one of them (`device_map={"": 0}`) it multiplies
# the batch and wraps the model into `nn.DataParallel`, which cuts every tensor of the batch in two along its first
# axis. For text that is right. For Qwen2-VL it is not: `pixel_values` has a row for each *patch*, not for each picture.
# A 4-bit model is spared the wrap, not the larger batch.
#
# **Fix.** One process drives one model. Where it sees several GPUs, spread the layers (`device_map="balanced"`):
# Trainer finds more than one device in `hf_device_map` and counts one GPU. Or start a process for each GPU
# (`accelerate launch`, `torchrun`), or show it a single one (`CUDA_VISIBLE_DEVICES=0`). `model.device_map()` chooses.
#
# A CPU has no GPUs to see, so the count is a stand-in below. All else is Trainer's own code.

# %%
qlora = get_peft_model(load(skip=["model.visual", "lm_head"]), LoraConfig(r=4, target_modules=r".*\.q_proj"))
one, spread = {"": "cpu"}, {"model.visual": 0, "model.language_model": 1}
two_gpus = {
    (kind.__name__, name, where): bugs.on_two_gpus(kind, vlm, placed, folder / "two", **material)
    for kind in (Trainer, SFTTrainer) for name, vlm in (("bf16", whole), ("NF4 + LoRA", qlora))
    for where, placed in (("on one device", one), ("spread over two", spread))
}
display(pd.DataFrame(two_gpus).T.fillna(""))
patches = batch["image_grid_thw"].prod(1)
two = collator([rows[int(patches.argmin())], rows[int(patches.argmax())]])
for number, half in enumerate(bugs.halves(two)):
    print(f"GPU {number}: {half['image_grid_thw'].prod()} patches in its picture, {len(half['pixel_values'])} given to "
          f"it: {bugs.outcome(lambda half=half: whole(**half).loss)}")
with patch("torch.cuda.device_count", return_value=2), patch("torch.cuda.is_available", return_value=True):
    alone = model.device_map()
    with patch.dict("os.environ", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}):
        launched = model.device_map()
plain, better = two_gpus["Trainer", "bf16", "on one device"], two_gpus["Trainer", "NF4 + LoRA", "spread over two"]
by_trl = "refuses that by now" if "refused" in two_gpus["SFTTrainer", "bf16", "on one device"] else "does the same"
print(f"Trainer makes {plain['batch']} pictures a step out of 4 on one device, and {better['batch']} when spread; "
      f"TRL's SFTTrainer {by_trl}.\n"
      f"This project: device_map={alone!r} for one process, {launched} for the second of two.")
saw(2, "DataParallel against device_map", plain == {"n_gpu": 2, "batch": 8, "model": "DataParallel"},
    better["n_gpu"] == 1 and alone == "balanced" and launched == {"": 1})

# %% [markdown]
# ## 3 · bf16 weights swallow small steps
#
# **Symptom.** The vision tower trains at a learning rate of 1e-5 and hardly changes. No error, no warning.
#
# **Cause.** A bf16 number has 8 significant bits: near .04 the next one is .0002 away. Adam moves a weight by about the
# learning rate, and what is less than half that gap is rounded back to where it was, at *every* step.
#
# Below, AdamW goes several steps along one real gradient of the vision tower: the best case, for all batches agree.
# The weights are held in fp32, in bf16, and in bf16 with *stochastic rounding* (up or down by chance, right on
# average).

# %%
tower = load().train()
tower.model.visual.requires_grad_(True)
tower(**batch).loss.backward()
weights = [weight for weight in tower.model.visual.parameters() if weight.grad is not None]
gradients = [weight.grad for weight in weights]
names = {"fp32": "fp32 (master weights)", "stochastic": "bf16, stochastic rounding", "bf16": "bf16"}
walks = {name: bugs.walk(weights, gradients, learning_rate, steps, held) for held, name in names.items()}
table = pd.DataFrame({name: {"moved after 1 step": walk["moved"][0], f"moved after {steps}": walk["moved"][-1],
                             "way (expected: 1)": walk["distance"][-1] / steps} for name, walk in walks.items()}).T
table.style.format({column: "{:.1%}" for column in table.columns[:2]} | {table.columns[2]: "{:.2f}"})

# %% tags=["thumbnail"]
half_gaps = torch.cat([bugs.half_gap(weight.detach()).flatten() for weight in weights])
display(lost_updates(half_gaps.numpy(), learning_rate, {name: walk["distance"] for name, walk in walks.items()}))
stuck, way = (half_gaps > learning_rate).float().mean().item(), table["way (expected: 1)"]
print(f"For {stuck:.1%} of the weights a step of {learning_rate:.0e} is less than half the way to the next bf16 "
      f"number, so {1 - stuck:.1%} should move.\nMeasured in bf16: {table.iloc[2, 0]:.1%}, and after {steps} steps "
      f"{table.iloc[2, 1]:.1%}: nothing adds up.\nOn average bf16 went {way.iloc[2]:.0%} of the way, stochastic "
      f"rounding {way.iloc[1]:.0%}, fp32 {way.iloc[0]:.0%}.")

# %% [markdown]
# **The same, made by a library.** PEFT gives LoRA fp32 weights. TRL casts them to bf16 where the base is quantised.
#
# **Fix.** Hold in fp32 whatever trains, and check it just before the training starts. LoRA's weights are few, so this
# costs little. Stochastic rounding would do too, but needs an optimizer that knows it.

# %%
stage = RECIPES["r1-llm-only"][0]
lora = get_peft_model(load(skip=["model.visual", "lm_head"]), LoraConfig(r=16, target_modules=stage.lora_targets))
held = {"PEFT": {str(p.dtype) for p in lora.parameters() if p.requires_grad}}
SFTTrainer(lora, bugs.config(folder / "cast"), **material)
held["TRL"] = {str(p.dtype) for p in lora.parameters() if p.requires_grad}
down = [p.detach() for name, p in lora.named_parameters() if "lora_A" in name]
share = {dtype: bugs.walk(down, [torch.randn_like(w) for w in down], learning_rate, 1, dtype)["moved"][0]
         for dtype in ("bf16", "fp32")}
model.trainable_to_fp32(lora)
held["model.trainable_to_fp32"] = {str(p.dtype) for p in lora.parameters() if p.requires_grad}
print(*(f"after {who}: {', '.join(dtypes)}" for who, dtypes in held.items()), sep="\n")
print(f"a step of {learning_rate:.0e} moves {share['bf16']:.1%} of LoRA's A in bf16, {share['fp32']:.1%} in fp32")
model.check_trainable(lora, stage)
saw(3, "bf16 weights that swallow small steps", table.iloc[2, 0] < 0.9 and held["TRL"] == {"torch.bfloat16"},
    table.iloc[0, 0] > 0.99 and held["model.trainable_to_fp32"] == {"torch.float32"})

# %% [markdown]
# ## 4 · A resume that starts from the base
#
# **Symptom.** A killed training of the vision tower goes on at the right step, with the loss of the first.
#
# The reproduction trains two steps, which leaves `checkpoint-2`. A second trainer resumes from it, and what it begins
# with is compared: to the checkpoint, as it should be, and to the base.

# %%
base = dict(load().named_parameters())
begins = {}
for kind in (SFTTrainer, trainer.BoxTrainer):
    trained, start = bugs.resumed(kind, load, folder / kind.__name__, **material)
    same = {of: sum(torch.equal(start.weights[name], other[name].float()) for name in trained)
            for of, other in (("as in the checkpoint", trained), ("as in the base", base))}
    begins[kind.__name__] = {"resumes at step": start.step, "tensors that train": len(trained)} | same
display(pd.DataFrame(begins).T)
file = load_file(folder / "SFTTrainer" / "checkpoint-2" / "model.safetensors")
old = next(name for name in file if "visual" in name)
print(f"Trainer's file says {old},\nthe model says {next(name for name in base if name.endswith(old))}: "
      f"{len(set(file) & set(base))} of {len(base)} names agree.")
saw(4, "a resume that starts from the base", begins["SFTTrainer"]["as in the base"] == len(trained),
    begins["BoxTrainer"]["as in the checkpoint"] == len(trained))

# %% [markdown]
# **Cause.** The names have changed with the versions: the tower is `model.visual` today. `save_pretrained` writes the
# *old* names, so that old programs can read the file, and `from_pretrained` translates them back. But Trainer resumes
# with a plain `load_state_dict(strict=False)`, which passes over every name that it does not find.
# `load_best_model_at_end` goes the same way. There is a warning, where the log level lets it through.
#
# **Fix.** Write and read what trains under the names that the model has, and refuse a file whose names are not exactly
# those: `BoxTrainer`, the second row.
#
# ## 5 · Autocast is not true bf16
#
# **Symptom.** Out of memory although `bf16=True`; or a run "in mixed precision" that is none.
#
# **Cause.** `bf16=True` casts *inside the matrix products*. It changes no weight: a model loaded in fp32 stays in fp32.
# A model loaded in bf16 stays in bf16, with its gradients and Adam's memory, and has no fp32 master weights whatever
# the flag says (bug 3). Adam's second moment then cannot shrink: .999 of a bf16 number rounds back to that number.

# %%
ways = {"fp32": (torch.float32, False), "fp32 + autocast": (torch.float32, True),
        "bf16 + autocast": (torch.bfloat16, True), "bf16": (torch.bfloat16, False)}
held = pd.DataFrame({name: bugs.one_step(load(dtype), batch, autocast) for name, (dtype, autocast) in ways.items()}).T
exact = held["logits"]["fp32"]
held["logits"] = [f"{(logits - exact).norm() / exact.norm():.1%} off" for logits in held["logits"]]
display(held)
print(f".999 ^ 1000 is {0.999**1000:.3f}. 'bf16 + autocast' holds what 'bf16' holds: the flag made no master weights.")
saw(5, "autocast taken for true bf16", held["1 · .999 ^ 1000"]["bf16 + autocast"] == 1.0
    and held["weights"]["fp32 + autocast"] == "float32", held["1 · .999 ^ 1000"]["fp32 + autocast"] < 0.4)

# %% [markdown]
# **Fix.** What is frozen may be bf16 or NF4; what trains is fp32, and the forward pass runs under autocast: the second
# row, whose 16 bytes are paid for the weights that train and for no other. `model.check_trainable` checks it.
#
# ## 6 · fp16 gives `nan`
#
# **Symptom.** The loss is `nan`, or a fine model answers `!!!!!!`: of logits that are no number, the first token wins.
#
# **Cause.** fp16 ends at 65504; bf16 reaches as far as fp32. Large language models carry a few very large numbers in
# their residual stream, the tiny one does not. So it is given a larger stream here: everything that is written into
# it times a factor. The next layer normalises the factor away, so the function is the same one, up to rounding.

# %%
def in_range(factor, dtype):
    """Loss and the beginning of an answer with a residual stream `factor` times as large."""
    vlm = bugs.scale_residual(load(dtype), factor)
    with torch.inference_mode():
        loss = vlm(**batch).loss.item()
    (line,) = predict.generate_lines(vlm, processor, [rows[0]], collator.prompt,
                                     {"max_new_tokens": 6, "do_sample": False})
    return {"largest number": bugs.largest_activation(vlm, batch), "loss": loss, "first six tokens": line["text"]}


streams = pd.DataFrame({(f"stream × {factor}", str(dtype).removeprefix("torch.")): in_range(factor, dtype)
                        for factor in (1, 2**14) for dtype in (torch.float32, torch.bfloat16, torch.float16)}).T
display(streams)
loss = streams["loss"].unstack()
print(f"With a stream {2**14} times as large, fp32 and bf16 keep their loss to within "
      f"{(loss[['float32', 'bfloat16']].diff(axis=0).abs() / loss[['float32', 'bfloat16']]).max().max():.2%}; "
      f"fp16's is {loss['float16'].iloc[1]}.")
saw(6, "nan from fp16", loss["float16"].isna().tolist() == [False, True], not loss["bfloat16"].isna().any())

# %% [markdown]
# **Fix.** bf16, on hardware that has it; Qwen2-VL was trained in it. Loss scaling is no cure, since the *forward* pass
# overflows. And stop at once: `trainer.LossLog` ends a training whose loss is no number, and `logging_nan_inf_filter`
# must be off, or Trainer logs the last good loss in its place.
#
# ## 7 · The evaluation shows 0 %
#
# **Symptom.** Not one box is counted. Read the answers before you blame the model: two causes lie outside of it.
#
# **Cause A: the end was never trained.** Padding is masked out of the loss. Where the end token is also the padding
# token (`pad_token = eos_token`, a popular line), it is masked everywhere. Here the head forgets `<|im_end|>` and
# learns it again, once from the right labels, once from such labels.

# %%
end = processor.tokenizer.convert_tokens_to_ids(messages.END_OF_TURN)
masked = batch["labels"].masked_fill(batch["input_ids"] == end, collate.IGNORED)  # what pad_token = eos_token does
answers, table = {}, {}
for name, labels in (("end token in the labels", batch["labels"]), ("end token masked as padding", masked)):
    learned = bugs.learn_head(load(torch.float32), batch, labels, end)
    lines = predict.generate_lines(learned, processor, list(rows), collator.prompt,
                                   {"max_new_tokens": 96, "do_sample": False})
    answers[name] = [line["text"] for line in lines]
    table[name] = {
        "end tokens in the labels": (labels == end).sum().item(),
        "answers that stop": sum(line["stopped"] for line in lines),
        "boxes an answer": sum(len(line["boxes"]) for line in lines) / len(lines),
        "one box and no more": f"{bugs.strict_detection(answers[name]):.0%}",
        "first box taken": f"{sum(bool(line['boxes']) for line in lines) / len(lines):.0%}",
    }
display(pd.DataFrame(table).T)
print("masked, the first answer:", answers["end token masked as padding"][0][:300], "…")
try:
    caught = collate.check_end_token(masked, end)
except ValueError as error:
    caught = str(error)
print("check_end_token:", caught)
stops = [row["answers that stop"] for row in table.values()]

# %% [markdown]
# An evaluation that demands one box finds none; one that takes the first box hides the fault. **Fix.** Look at the
# labels, not at the text: `Collator` finds the answer by its header, not by the padding, and `check_end_token` refuses
# a batch without an end. Count the answers that stop (`stopped` in `predictions.jsonl`).
#
# **Cause B: the wrong tokens were stripped.** `skip_special_tokens=True` takes the marks of the boxes with it, and a
# pattern that asks for them finds nothing. So does a pattern for the whole answer, if the prompt was not cut off.

# %%
asked = processor(images=[row["image"].convert("RGB") for row in rows], padding=True, padding_side="left",
                  text=[processor.apply_chat_template(messages.to_messages(row, collator.prompt)["prompt"],
                                                      add_generation_prompt=True) for row in rows],
                  return_tensors="pt")
out = load().generate(**asked, max_new_tokens=96, do_sample=False)
new = out[:, asked["input_ids"].shape[1]:]  # padded on the left: all prompts end in the same column
decoded = {
    "cut, special tokens kept": [processor.decode(ids).replace("<|endoftext|>", "") for ids in new],
    "cut, special tokens stripped": processor.batch_decode(new, skip_special_tokens=True),
    "prompt not cut off": [processor.decode(ids).replace("<|endoftext|>", "") for ids in out],
}
read = pd.DataFrame({how: {
    "strict pattern": bugs.strict_detection(texts),
    "parse_text": sum(len(messages.parse_text(text).boxes_xyxy_unit) > 0 for text in texts) / len(texts),
} for how, texts in decoded.items()}).T
display(read.style.format("{:.0%}"))
print(f"The same answers of the same model: {read.iloc[0, 0]:.0%} or {read.iloc[1, 0]:.0%}, by how they were decoded.")
saw(7, "an evaluation that shows 0 %", stops[1] == 0 and read.iloc[0, 0] > 0 and (read.iloc[1:, 0] == 0).all(),
    stops[0] > 0 and "never learn to stop" in str(caught) and read.iloc[1, 1] == read.iloc[0, 1] > 0)

# %% [markdown]
# **Fix.** `predict` keeps the special tokens and cuts at the padded length; `parse_text` reads a box with its marks or
# without, and lists what it rejected. Format and parser stand in one file, and a test sends boxes there and back.
#
# ## 8 · Memory that is not given back
#
# **Symptom.** `del model`, and the second run of the same notebook is out of memory.
#
# **Cause.** `del` removes a name, not the model. Others may hold it: a trainer and its parts, which hold each other in
# a ring; an error, whose traceback holds every variable of every frame (IPython keeps the last one for you); and
# `Out`, where IPython keeps the value of a cell that ends in `model`.

# %%
def broken_run():
    """A run that dies inside the model, as one without memory does."""
    vlm = load()
    vlm(input_ids=torch.tensor([[10**9]]))


model.free_memory()
held = {"before": bugs.living_weights()}
sft = SFTTrainer(load(), bugs.config(folder / "ring"), **material)
held["a trainer, in use"] = bugs.living_weights()
del sft
held["a trainer, after del"] = bugs.living_weights()
model.free_memory()
held["a trainer, after free_memory()"] = bugs.living_weights()
try:
    broken_run()
except IndexError as error:
    kept = error
model.free_memory()
held["an error that is kept, after free_memory()"] = bugs.living_weights()
del kept
model.free_memory()
held["the error deleted, after free_memory()"] = bugs.living_weights()
memory = (pd.Series(held, name="MB of weights held") - held.pop("before")).round(1).drop("before")
display(memory.to_frame())
in_use, after_del, freed, with_error, without = memory
print(f"After del {after_del} of {in_use} MB were still held, and an error held {with_error}.")
saw(8, "memory that is not given back", min(after_del, with_error) > 0.5 * in_use, freed == without == 0)

# %% [markdown]
# **Fix.** Build what a run needs inside a function and let it go out of scope, or `del` the names; then
# `model.free_memory()` collects the rings and gives PyTorch's cache back to the GPU. Where a cell has shown the model,
# `%xdel model` takes it out of `Out` too (`%reset -f out` leaves `_` behind). A last error goes when another one comes.
# `nvidia-smi` shows what is *reserved*, `torch.cuda.memory_allocated()` what is held.
#
# All that happened above, in one table:

# %%
assert sorted(seen) == list(range(1, 9))
pd.DataFrame(seen).T.rename_axis("section")
