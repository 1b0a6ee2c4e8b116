# %% [markdown]
# # Teaching Qwen2-VL to draw boxes
#
# Qwen2-VL is a vision-language model: it takes pictures and text, and writes text. This notebook fine-tunes
# **Qwen2-VL-7B-Instruct** with QLoRA until it can tell where the nutrition table is in a photo of food packaging. It
# goes the whole way: photos → messages → tokens and labels → a quantized model → training → boxes → a score → one
# merged model on disk. Each section says why its step exists, shows it on one small example, and then does it for real.
#
# It runs at two sizes through the same code. On a GPU with room it takes the 7B model and the data set
# `openfoodfacts/nutrition-table-detection`. Anywhere else it takes the *embedded default*: a tiny model of the same
# architecture and rendered packaging, both in this repository, in minutes on a laptop's CPU and offline.
#
# | you want to | do |
# |---|---|
# | read and try | run the cells from top to bottom |
# | run it headless | `papermill pipeline.ipynb out.ipynb -p recipe r4-joint` |
# | run it on several GPUs | `accelerate launch pipeline.py recipe=r4-joint` |
#
# ## 1 · Parameters
#
# Everything that can be set stands in the next cell. `None` means: the value that belongs to the scale.

# %% tags=["parameters"]
# what runs
recipe = "r4-joint"  # base, r1-llm-only, r2-vision-only, r3-two-stage, r4-joint, r5-reward
scale = "auto"  # 7b, tiny; auto: 7b where a GPU has room for the recipe, else tiny
model_id = None  # Hub id or local folder
model_revision = None  # commit, branch or tag on the Hub; None: the commit this was written for
dataset_id = None  # Hub id, local folder or file, or embedded
dataset_revision = None
classes = None  # which to train on, such as "Table, Logo", or new names for them (see README); None: all
box_format = None  # what the files' boxes are, such as xyxy-pixels or cxcywh-unit; None: what they say, or what fits
unlabelled = None  # pictures listed without a box: negative (no table in them) or skip; None: refused if many
val_share = 0.1  # where the data set names no val: the share of its pictures that become val

# the prompt, and what the loss is computed on
prompt = "Detect the bounding box of the nutrition table."  # {classes} in it stands for the names of the classes
loss_scope = "assistant"  # assistant: the completion alone; all-text: system and user text too
min_pixels = None  # pixel budget of a picture; 28 x 28 pixels make one image token
max_pixels = None

# training
epochs = None
learning_rate = None
batch_size = None  # pictures a step; with several processes all together
accumulation = None  # steps whose gradients are added up
lora_rank = None
lora_alpha = None
lora_dropout = None
precision = None  # nf4 or bf16: what the frozen base is stored in; None: as the recipe says
memory = None  # low: activations wait in the host's memory, merging on the CPU; r1 and r4 at 7B need a GPU of 16 GiB
gradient_checkpointing = None  # recompute activations in the backward pass; None: where memory needs it
augment = None  # True: another view of each training picture in each epoch, its boxes moved with it
paste = None  # pictures with several tables or none, pasted from the others: how many to each real one
reward_steps = None  # r5's updates by rewards, each of batch_size x accumulation pictures
reward_learning_rate = None
reward_completions = None  # sampled of each picture
reward_beta = None  # weight of the KL divergence to the model before
seed = 0
train_limit = None  # use only the first so many pictures
val_limit = None
eval_steps = None  # measure IoU on a few pictures of selection every so many steps; None: never
eval_pictures = 32  # how many
keep = "last"  # last or best: which step's weights are kept, best by that IoU

# prediction, merging
predict_batch_size = None
max_new_tokens = 128
constrained = False  # constrained decoding: only boxes in the format can be generated; False is the published protocol
passes = 1  # of inference over a picture: boxes found are painted over and it runs again, until it finds none
merge_base = "dequantized"  # or full: which weights the adapter is merged into

# where and how
gpus = None  # such as "0,1"; None: all
output_root = "runs"
hf_home = None  # the Hub's downloads and caches; None: HF_HOME, else ~/.cache/huggingface
run_name = None  # None: the recipe's name
save_steps = None  # a checkpoint every so many steps
report_to = "auto"  # wandb, tensorboard, none; auto: W&B where there are credentials

# %% [markdown]
# A training can run for hours, so a mistake should cost seconds. The parameters are checked before anything heavy is
# imported: a misspelled name, a wrong type, a folder that cannot be written or a GPU that is too small ends the run
# here, with one sentence. What comes back, `run`, has every default filled in; what differs from the cell above is
# printed.

# %%
from helpers import settings

run = settings.settle(globals())
print(*(f"{name} = {value}" for name, value in run.values.items() if value != globals()[name]), sep="\n")

# %%
from helpers import runs

runs.quiet_libraries()
from pathlib import Path

import pandas as pd
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from IPython.display import display
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2VLProcessor
from trl import GRPOConfig, SFTConfig

from helpers import boxes, collate, data, evaluate, merge, messages, model, parity, plots, predict, processes
from helpers import reward, speed, trainer
from helpers.augment import Augment
from helpers.data.paste import with_pasted
from helpers.evaluate import reports

pd.options.display.max_colwidth = 160

# %% [markdown]
# Before the details, a picture of the whole. A photo is cut into patches, and the **vision tower** turns them into
# image tokens. They stand in the prompt like words, and the **language model** reads both and writes the completion,
# one token after the other. Grey is frozen, hatched is quantized to 4 bits, orange is trained. The loss is computed on
# the completion only.

# %%
plots.overview([stage_run.stage for stage_run in run.stages], run.loss_scope)

# %% [markdown]
# ## 2 · Data
#
# Every source of photos (the Hub, a folder of your own, the embedded scenes) becomes rows of one schema. Here is one
# row. A box is `[y_min, x_min, y_max, x_max]` as shares of the picture, from its top left corner.

# %%
limit = {"train": run.train_limit, "val": run.val_limit}
with processes.main_first():
    raw = data.load_raw(**data.source_of(run.values), limit={split: n for split, n in limit.items() if n})
if run.stages and not len(raw["train"]):
    raise data.DataError(f"dataset_id={run.dataset_id!r} has pictures for val alone, and only recipe=base trains "
                         "nothing; name their folder train, and val is taken from it.")
run.values["prompt"] = run.prompt.replace("{classes}", ", ".join(data.names_in(*raw.values())))
raw["val"][0]

# %% [markdown]
# Photos that people took come with faults: a box of no size, a picture stored on its side, one photo twice. A model
# learns such faults as readily as it learns the rest, so we look for them first. The audit finds them by rule, and the
# table says what is done about each. Nothing is dropped in silence: the sheet shows up to three pictures of each kind
# with the boxes that came in, and `audit.jsonl` in the run's folder lists every finding by its id.

# %%
with processes.main_first():
    audit = data.audit(raw)
    rows = data.prepare(data.clean(raw, audit), run.min_pixels, run.max_pixels)
display(audit.table(), audit.statistics)
plots.audit_sheet(raw, audit)

# %% [markdown]
# These are the boxes as they will be trained on, the first of train and of val. If a box lies beside its table here,
# stop and correct the data: no training can make up for it. `make data DATASET=folder` shows more of them without a
# training.

# %%
truth, six = data.truth_rows(rows["val"]), rows["val"].select(range(min(6, len(rows["val"]))))
first = rows["train"].select(range(min(6, len(rows["train"]))))
plots.gallery([*first, *six], [*data.truth_rows(first), *truth], title="The first of train, then of val, as trained on")

# %% [markdown]
# Before any model, a number to beat. Which *one* box, given for every picture, fits the training pictures best? Most
# tables lie near the middle, so even this scores something. A model that scores no more has learned no more than that.

# %%
fitted_on = "train" if len(rows["train"]) else "val"
constant_box = evaluate.best_constant_box(data.truth_rows(rows[fitted_on]))
constant = evaluate.constant_predictions(constant_box, truth)
constant_iou = evaluate.with_interval(evaluate.score(truth, constant)["summary"]["mean_iou"])
print(f"best constant box, fitted on {fitted_on}, {constant_box.round(3)}: mean IoU {constant_iou} on val")

# %% [markdown]
# Most photos show one table, and a model that trains on them learns to draw one box and stop. `paste` adds pictures
# with several tables and with none, made from pieces of the others; `notebooks/10_better_boxes` shows what they bring.

# %%
with processes.main_first():
    rows["train"] = with_pasted(rows["train"], run.paste, run.seed)
print(len(rows["train"]), "pictures to train on")

# %% [markdown]
# ## 3 · Messages
#
# A language model writes text, so a box must become text. Qwen2-VL was pre-trained with a format of its own for this:
# whole thousandths of the picture's width and height, x first, between special tokens. The model knows it already, so
# we keep it, and spend the training on *where* instead of on *how to write it*.
#
# One row becomes a prompt, which the model gets, and a completion, which it should write:

# %%
example = rows["val"][0]
chat = messages.to_messages(example, run.prompt)
display({"prompt": chat["prompt"], "completion": chat["completion"]})

# %% [markdown]
# The way back is a parser. It must return what went in, up to the rounding to thousandths (the row's boxes are shown x
# first and in reading order, as in the text). What it cannot read it rejects with a reason, here swapped corners. It
# repairs nothing, because a repaired box would hide a model that writes nonsense.

# %%
completion = chat["completion"][0]["content"][0]["text"]
parsed = messages.parse_text(completion)
true = boxes.yxyx_unit_to_xyxy_unit(example["objects"]["bbox"])
true = true[boxes.reading_order(true)].round(4)
display({"from the text": parsed.boxes_xyxy_unit.tolist(), "from the row": true.tolist()})
messages.parse_text("<|box_start|>(700,495),(126,625)<|box_end|>").rejected

# %% [markdown]
# ## 4 · Tokens and labels
#
# The processor cuts the picture into patches of 14 × 14 pixels, and the model merges 2 × 2 patches into one image
# token. `min_pixels` and `max_pixels` bound how many there are: more tokens show smaller print and cost more time. They
# must be the same in training and in use, or the boxes get worse without a word. So they are stored with every
# checkpoint and model (`parity.json`), with the prompt and the tokenizer, and a use that differs is refused.

# %%
processor = Qwen2VLProcessor.from_pretrained(run.model_path, revision=run.model_revision,
                                             min_pixels=run.min_pixels, max_pixels=run.max_pixels)
made_with = parity.record(processor, run.prompt, run.max_new_tokens)
collator = collate.Collator(processor, run.prompt, run.loss_scope)
collate.check_limits(rows, collator, run)  # the longest completion and the longest sequence fit
print(collator.texts([example])[0])

# %% [markdown]
# A model is trained to predict each next token. The **labels** say on which tokens it is corrected; everywhere else
# they are -100, which the loss skips. With `assistant` they are the completion and the `<|im_end|>` after it. That last
# token is easy to forget, and a model trained without it never learns to stop. `<|image_pad|>` repeats once for every
# image token.

# %%
batch = collator([row for row in six.select([0, len(six) - 1])])
display({name: list(tensor.shape) for name, tensor in batch.items()})
plots.label_mask(processor.tokenizer, batch["input_ids"][0], batch["labels"][0])

# %% [markdown]
# ## 5 · The model
#
# In bf16 a 7B model takes 16 GB, before a single gradient. **QLoRA** stores the frozen weights in 4 bits instead. NF4
# has 16 levels, placed where normally distributed weights lie, and one scale for each block of 64 weights. When a layer
# computes, its weights are dequantized to bf16, used, and forgotten. Four numbers, there and back:

# %%
weights = torch.tensor([[0.9, 0.45, 0.02, -0.3]])
packed, state = quantize_4bit(weights, quant_type="nf4")
print(f"two in a byte, {packed.flatten().tolist()}, with a scale of {state.absmax.item():.2f}:",
      dequantize_4bit(packed, state))

# %% [markdown]
# Only the language model is quantized. The vision tower is small, and rounding it costs accuracy before the language
# model reads a single token. `llm_int8_skip_modules` keeps it out, by the names that its modules have today.

# %%
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=model.compute_dtype(),
    llm_int8_skip_modules=["model.visual", "lm_head"],
)


def load_base(precision, path=run.model_path, device_map=None):
    """A frozen Qwen2-VL in `nf4` or `bf16`, on all GPUs of this process, or on the CPU where there is none."""
    model.patches_as_product()
    base = model.load(
        path,
        made_with,
        ours=path != run.model_path,
        revision=run.model_revision if path == run.model_path else None,
        quantization_config=nf4 if precision == "nf4" else None,
        dtype=model.compute_dtype(),  # bf16, where the machine has it
        attn_implementation=model.attention(),
        device_map=device_map or model.device_map(),
    )
    model.check_precision(base, precision)
    return base.requires_grad_(False).eval()


# %% [markdown]
# `model.load` is `from_pretrained`, and stops where a weight is missing or of another shape (transformers would fill it
# with random numbers and only warn). `check_precision` stops where a layer is quantized that should not be, or the
# other way round. The first table shows which layers are really NF4, the second what each part is stored in: packed
# 4-bit weights show as `uint8`, and a CPU that has no fast bf16 takes `float32` for the rest.

# %%
first_precision = run.stages[0].stage.precision if run.stages else run.precision or "nf4"
base = load_base(first_precision)
display(pd.Series(model.layer_kinds(model.nf4_layers(base)), name="NF4 layers", dtype=int).to_frame())
pd.DataFrame(model.parameters_by_tower(base)).T.assign(dtype=model.dtypes_by_tower(base))

# %% [markdown]
# ## 6 · The baseline
#
# How good is the model before any training? Without this row nobody knows what the training was worth. We generate
# greedily (the most likely token each time), in batches padded on the left, so that all prompts end where generation
# begins. With `constrained` only the names below and digits can be generated: the format is then given, not learned.
# With `passes` above 1 the boxes found are painted over, and inference runs again for what they hid
# (`notebooks/10_better_boxes`).
#
# Predictions are files: one JSON line a picture, with the whole text. Of boxes of a class that lie on each other (IoU
# above .5) only the first is kept (non-maximum suppression). `runs.step` skips a step whose inputs have not changed, by
# a hash over all of them, and a run that was killed goes on at the line where it stopped.

# %%
names = data.names_in(*rows.values()) if run.constrained else None
val = {"val": runs.rows_hash(rows["val"]), "pixels": [run.min_pixels, run.max_pixels], "prompt": run.prompt,
       "max_new_tokens": run.max_new_tokens, "names": names, "passes": run.passes}


def predict_val(load, path, **inputs):
    """Boxes for every picture of val by the model of `load()`, as JSON lines in `path`; kept where no input changed."""
    inputs |= val
    with runs.step(path.parent, path.name, inputs, made=path, run_folder=run.folder) as todo:
        if todo:
            vlm = load()
            vlm.set_attn_implementation(model.attention(training=False))
            predict.predict(vlm, processor, rows["val"], run.prompt, path, batch_size=run.predict_batch_size,
                            key=runs.key(**inputs), names=names, passes=run.passes, max_new_tokens=run.max_new_tokens,
                            do_sample=False)
            del vlm
            model.free_memory()
    return predict.read_jsonl(path)


# %% [markdown]
# Four recipes share one untrained model, so its predictions lie in a folder of their own, named by their hash.

# %%
del base
model.free_memory()
untrained = {"base": parity.files_hash(run.model_path, run.model_revision), "precision": first_precision}
runs.open_folder(run, base=untrained["base"], train=runs.rows_hash(rows["train"]))
if processes.is_main():
    audit.write(run.folder / "audit.jsonl")
shared = Path(run.output_root) / "baselines" / runs.key(**untrained, **val)
baseline = predict_val(lambda: load_base(first_precision), shared / "baseline.jsonl", **untrained)
print(*(line["text"] or "(nothing)" for line in baseline[:3]), sep="\n")

# %% [markdown]
# ## 7 · Training
#
# A recipe is a list of stages. A stage trains LoRA adapters on one or both towers, or the whole vision tower.
# `precision` is what its frozen base is stored in; with `reward` it learns from rewards instead of labels.

# %%
stages = pd.DataFrame([vars(one.stage) | vars(one) for one in run.stages])
stages.reindex(columns=["name", "trains", "towers", "precision", "learning_rate", "reward"])

# %% [markdown]
# **LoRA** leaves a weight matrix $W$ as it is and learns a small product beside it: $W + \frac{\alpha}{r} B A$, where
# $A$ has $r$ rows and $B$ has $r$ columns. With rank 64 that is 2 % of the weights of 7B. $B$ starts at zero, so the
# model starts as it was. The smallest example, one layer of 4 inputs and 3 outputs at rank 1:

# %%
W, A, B = torch.zeros(3, 4), torch.tensor([[1.0, 0, 0, -1]]), torch.tensor([[0.5], [0], [1]])
print(f"{A.numel() + B.numel()} numbers trained in place of {W.numel()}:", W + B @ A, sep="\n")

# %% [markdown]
# `target_modules` is *one* regular expression: inside a list PEFT would match nothing, and train nothing, without a
# word. Weights that train are fp32 in every recipe: in bf16 a step of 1e-5 is rounded away.

# %%
def make_trainable(base, stage_run):
    """Adapters on the stage's towers, new or those of the stage before; or the whole vision tower in fp32."""
    stage = stage_run.stage
    if stage.trains == "full":
        base.model.visual.float().requires_grad_(True)
        return base
    if stage_run.start:
        return model.load_adapter(speed.for_sampling(base), stage_run.start, trainable=True)
    lora = LoraConfig(
        r=run.lora_rank,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        target_modules=stage.lora_targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


# %% [markdown]
# The trainer's settings. The learning rate rises over the first 5 % of the steps and then falls along a cosine, and a
# gradient whose norm is above 1 is scaled down to it.

# %%
batch_size, accumulation = run.share  # an update is of batch_size x accumulation pictures, shared by all processes


def in_every_stage(stage_run):
    """What all kinds of training have in common."""
    return dict(
        output_dir=str(stage_run.folder),
        per_device_train_batch_size=batch_size,
        learning_rate=stage_run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_grad_norm=1.0,
        bf16=model.compute_dtype() == torch.bfloat16,
        save_steps=run.save_steps,
        seed=run.seed,
        report_to=run.report_to,
        run_name=stage_run.name,
        **trainer.COMMON,  # logging each step, how many checkpoints stay, processes that open pictures
    )

# %%
def sft_config(stage_run, fits):
    """How a stage is trained on labels."""
    return SFTConfig(
        num_train_epochs=run.epochs,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=fits.recompute,
        activation_offloading=run.memory == "low" and len(model.gpus()) == 1,  # the rest waits in the host's memory
        max_length=None,  # TRL's default of 1024 would cut image tokens
        **in_every_stage(stage_run),
    )


# %% [markdown]
# Three things save time and change a number only in its last digits. First, LoRA's product is added in place, and on a
# GPU small operations are compiled. Second, the longest batch is tried. Only if its activations do not fit into memory
# are they recomputed in the backward pass (gradient checkpointing), in as few layers as possible. Third, a vision tower
# that does not train encodes each picture once, not once an epoch.

# %%
def fit(tuned, train_rows, stage_collator):
    """Whether to recompute activations, and what layers keep all the same."""
    if run.gradient_checkpointing is not None:
        return speed.Fit(run.gradient_checkpointing)
    longest = collate.longest(train_rows, batch_size, run.min_pixels, run.max_pixels)
    return speed.fit(tuned, (collator if run.augment else stage_collator)(longest))


def training_data(stage_run, tuned, augment):
    """The rows to train on, and the collator that makes batches of them."""
    collator = collate.Collator(processor, run.prompt, run.loss_scope, augment)
    if not speed.worth_caching(stage_run.stage, run.augment, run.epochs):
        return rows["train"], collator
    file = stage_run.folder / "features.bin"
    cached = speed.CachedFeaturesCollator(collator, tuned, rows["train"], file, run.share[0])
    return cached.rows, cached


# %% [markdown]
# `BoxTrainer` is TRL's `SFTTrainer` with checkpoints that hold exactly the weights that train. Killed at any point, the
# same command goes on from the last whole checkpoint.

# %%
def on_labels(stage_run, tuned, **proofs):
    """The trainer of a stage that learns the true completions."""
    augment = Augment(run.seed) if run.augment else None
    train_rows, stage_collator = training_data(stage_run, tuned, augment)
    fits = fit(tuned, train_rows, stage_collator)
    callbacks = [augment] if augment else []  # learns the epoch
    return trainer.BoxTrainer(tuned, args=sft_config(stage_run, fits), train_dataset=train_rows,
                              data_collator=stage_collator, processing_class=processor,
                              callbacks=[speed.KeepActivations(fits.kept), *callbacks], **proofs)


# %% [markdown]
# **Rewards** (`r5-reward` goes on from r1 with them). Cross-entropy corrects one token at a time and knows nothing of
# overlap: a wrong digit costs the same whether the box moves by a hair or onto another table, and to leave out the
# second table is one wrong token. GRPO trains on the score itself. The model samples several completions for a picture,
# each gets a reward, and those above the mean of their picture become more likely, the others less. A KL divergence of
# weight `beta` keeps it near the model that it began with. There are three rewards, of boxes matched one to one:

# %%
def iou(match):
    """Overlap with the true boxes, over all boxes there are: one that is missing costs, and so does one too many."""
    boxes = max(len(match["true"]), len(match["predicted"]))
    return sum(match["box_ious"]) / boxes if boxes else float(not match["format_error"])  # without a table: the denial


def count(match):
    return float(len(match["true"]) == len(match["predicted"]))


def form(match):
    return float(match["stopped"] and not match["format_error"])


rewards = {iou: 1.0, count: 0.25, form: 0.25}  # and their weights

# %% [markdown]
# By hand, a picture with two tables. The advantage of a completion is its reward minus the mean. To leave the second
# table out costs half of the reward, and to break the format costs more:

# %%
two = {"bbox": [[0.1, 0.1, 0.3, 0.5], [0.6, 0.1, 0.8, 0.5]], "category_name": ["nutrition-table"] * 2}
both = messages.target_text(two)
completions = {"both": both, "the first alone": both[: len(both) // 2], "the second cut off": both[:-20],
               "none": messages.NO_TABLE}  # fmt: skip
found = {name: reward.match({"image_id": "", "objects": two}, text + "<|im_end|>")
         for name, text in completions.items()}
scored = pd.DataFrame({name: {one.__name__: one(match) for one in rewards} for name, match in found.items()}).T
total = scored @ list(rewards.values())
scored.assign(reward=total, advantage=total - total.mean())

# %% [markdown]
# `RewardTrainer` is TRL's `GRPOTrainer`, with the same checkpoints, prompt and pixels. It keeps a frozen copy of the
# adapter, for the KL divergence.

# %%
def grpo_config(stage_run):
    """How a stage is trained by rewards."""
    return GRPOConfig(
        num_generations=run.reward_completions,
        steps_per_generation=run.reward_completions,  # completions of batch_size pictures are generated at once,
        gradient_accumulation_steps=accumulation * run.reward_completions,  # and batch_size of them make a step
        max_completion_length=run.max_new_tokens,
        temperature=1.0,
        beta=run.reward_beta,
        reward_weights=list(rewards.values()),
        scale_rewards="none",  # an advantage is not divided by its group's spread: small differences stay small
        disable_dropout=True,
        shuffle_dataset=False,  # `reward.pictures_of` does
        num_train_epochs=1,
        gradient_checkpointing=run.scale == "7b" if run.gradient_checkpointing is None else run.gradient_checkpointing,
        **in_every_stage(stage_run),
    )


def by_rewards(stage_run, tuned, **proofs):
    """The trainer of a stage that learns by rewards, on pictures as they are."""
    return reward.RewardTrainer(tuned, grpo_config(stage_run), rows=rows["train"], steps=run.reward_steps,
                                prompt=run.prompt, rewards=list(rewards), processing_class=processor, **proofs)


# %% [markdown]
# Now one stage, from the base to weights on disk.

# %%
def train(stage_run):
    """Train one stage and save it; returns the table of what trained, per tower."""
    stage, base_of = stage_run.stage, parity.base_of(stage_run.base, run.model_revision)
    transformers.set_seed(run.seed)  # the same start, whatever this process did before
    tuned = make_trainable(load_base(stage.precision, stage_run.base), stage_run)
    print(speed.speed_up(tuned))
    fitting = (by_rewards if stage.reward else on_labels)(stage_run, tuned, made_with=made_with, base=base_of)
    fitting.add_callback(trainer.LossLog(stage_run.folder))
    if run.eval_steps:
        fitting.add_callback(trainer.IoUDuringTraining(fitting, rows["selection"], run))
    model.trainable_to_fp32(tuned)  # TRL has just cast LoRA to bf16
    table = model.check_trainable(tuned, stage)
    fitting.train(resume_from_checkpoint=trainer.last_checkpoint(stage_run.folder))
    speed.plain_rotations()
    fitting.save_result(stage_run.result, keep=run.keep)
    return table


# %%
trained = {}
for stage_run in run.stages:
    inputs = runs.training_values(run, stage_run.stage)
    inputs |= {"base": parity.files_hash(stage_run.base, run.model_revision), "train": runs.rows_hash(rows["train"])}
    inputs |= {"start": parity.files_hash(stage_run.start)} if stage_run.start else {}
    with runs.step(stage_run.folder, "train", inputs, made=stage_run.result, wait=False) as todo:
        if todo and not runs.trained_elsewhere(stage_run, inputs):
            trained[stage_run.name] = pd.DataFrame(train(stage_run)).T
            model.free_memory()
        elif not todo:
            print(f"{stage_run.name}: trained before with the same inputs, in {stage_run.folder}")

# %% [markdown]
# The table counts what trained in each tower: the recipe's towers and no other. The curve is the mean loss of the
# completion's tokens. Most of these are fixed by the format, so it drops fast to the level where only digits are left
# to learn. A low loss is no proof of good boxes; IoU, below, is. Rewards are those of sampled completions, which are
# worse than the greedy ones that are scored.

# %%
logs = {stage_run.name: trainer.read_log(stage_run.folder / "log.jsonl") for stage_run in run.stages}
gains = {name: pd.Series([line["reward"] for line in log if "reward" in line]) for name, log in logs.items()}
if logs:
    display(plots.loss_curves({name: log for name, log in logs.items() if gains[name].empty}, smooth=9,
                              path=run.folder / "figures" / "loss.png"))
for name, gain in gains.items():
    if not gain.empty:
        print(f"{name}: mean reward of ten updates, first {gain[:10].mean():.3f}, last {gain[-10:].mean():.3f}")
display(*trained.values())

# %% [markdown]
# ## 8 · Prediction
#
# The fine-tuned model is loaded from what was saved: the quantized base and the adapter, as they were trained. So what
# is scored here is what a later reader of the folder gets. `load_adapter` checks that every weight of the file found
# its place; after a rename of modules PEFT would load what fits and only warn.

# %%
last = run.stages[-1] if run.stages else None


def load_trained():
    """The fine-tuned model as it was trained, from the files of the last stage."""
    if last.stage.trains == "full":
        return load_base("bf16", str(last.result))
    parity.check(last.result, made_with, parity.base_of(last.base, run.model_revision))
    return model.load_adapter(load_base(last.stage.precision, last.base), last.result)


# %%
predictions = baseline
if last:
    trained_on = {"weights": parity.files_hash(last.result), "base": parity.files_hash(last.base, run.model_revision)}
    predictions = predict_val(load_trained, run.folder / "predictions.jsonl", **trained_on)
print(*(line["text"] for line in predictions[:3]), sep="\n")

# %% [markdown]
# ## 9 · Evaluation
#
# **IoU** is the overlap of predicted and true box over their union: 1 is perfect, 0 is a miss or no box at all. By
# hand, two boxes of 4 × 2 that share half of their area:

# %%
a, b = [0, 0, 4, 2], [2, 0, 6, 2]
shared_area, together = 2 * 2, 4 * 2 + 4 * 2 - 2 * 2
print(f"IoU of {a} and {b}: {shared_area} / {together} = {shared_area / together:.3f}")

# %% [markdown]
# Mean IoU stands with its 95 % bootstrap interval: how far it would move with other pictures of the same kind. Three
# rows: the model after training, before it, and the constant box. The second table shows the fine-tuned model by class.
# Here the classes are kinds of one thing, and a box may have any of their names; with classes of your own, a box counts
# for its own class only.

# %%
lines = {"fine-tuned": predictions, "base": baseline, "constant box": constant}
metrics = reports.write_metrics(run.folder, lines, truth)
display(reports.metrics_table(metrics), reports.class_table(next(iter(metrics["scores"].values()))))

# %% [markdown]
# That is against the cleaned truth. Against the truth as its source has it, an empty box counts as a miss, and a
# picture that the audit dropped as one without a prediction:

# %%
raw_metrics = reports.write_metrics(run.folder / "raw", lines, data.raw_truth(raw["val"]))
reports.metrics_table(raw_metrics)

# %% [markdown]
# The same pictures before and after. A glance is no evaluation, but it shows what kind of error is left. The curves
# below it show all of val: how many pictures reach each IoU.

# %%
plots.before_after(six, truth, baseline, predictions, path=run.folder / "figures" / "before_after.png")

# %%
plots.iou_curves({"constant box": constant, "base": baseline, "fine-tuned": predictions}, truth,
                 path=run.folder / "figures" / "iou.png")

# %% [markdown]
# Is the gain more than chance? Both models were scored on the same pictures, so we compare picture by picture:
# differences vary less than scores do. If the interval does not contain 0, the gain is significant at 95 %.

# %%
before, after = metrics["scores"]["base"], metrics["scores"]["fine-tuned"]
gain = evaluate.paired_bootstrap(after["per_picture"], before["per_picture"])["difference"]
print(f"fine-tuned minus base on the same {gain['n']} pictures: {evaluate.with_interval(gain)} mean IoU")

# %% [markdown]
# ## 10 · Merging
#
# An adapter needs its base beside it, and not every server takes one. Merging adds $BA$ into the weights and gives one
# plain checkpoint. Two things have to hold, and both are measured:
#
# * **Algebra.** On one base, the adapter applied and the adapter merged give the same logits, up to rounding.
# * **What matters.** The model that ships (merged, bf16) against the model as it was trained (NF4 base and adapter):
#   their boxes and IoU, picture by picture. With `memory="low"` the merged model generates in NF4, rounded once more.
#
# Into which weights? The adapter has learned beside NF4's rounded weights, and makes up for some of that rounding.
# Merged into the *dequantized* weights it stays closest to what was trained; into the `full` ones it would correct
# errors that are not there.

# %%
def merge_into(kind):
    """The adapter merged into the `full` precision base, or into the `dequantized` NF4 weights it was trained on."""
    dtype = torch.float32 if run.scale == "tiny" else torch.bfloat16  # 7B in fp32 would take 33 GB
    place = {"": "cpu"} if run.memory == "low" else model.device_map()
    if kind == "dequantized" and last.stage.precision == "nf4":
        base = load_base("nf4", last.base, place).dequantize().to(dtype)
    else:
        base = model.load(last.base, made_with, dtype=dtype, device_map=place,
                          revision=run.model_revision if last.base == run.model_path else None)
    adapted = model.load_adapter(base, last.result)
    if run.memory == "low":  # logits of a 7B model can take hours on a CPU; each layer's weights are compared
        return merge.merge_adapter(adapted, None)[0]
    merged, difference = merge.merge_adapter(adapted, batch)
    print(f"adapter applied against merged, in {dtype}: logits differ by {difference:.1e} of their size")
    return merged


# %%
merges = bool(last) and last.stage.trains == "lora"
if merges:
    inputs = trained_on | {"merge_base": run.merge_base}
    with runs.step(run.folder, "merge", inputs, made=run.merged_folder) as todo:
        if todo and processes.is_main():
            merge.save_merged(merge_into(run.merge_base), processor, run.merged_folder, made_with,
                              parity.base_of(last.base, run.model_revision))
shipped = run.merged_folder if merges else last.result if last else run.model_path
if last and processes.is_main():
    parity.note_use(shipped, max_new_tokens=run.max_new_tokens, passes=run.passes)

# %% [markdown]
# The merged folder is loaded like any other model, by its path, and predicts boxes for the same pictures. If the
# interval contains 0, merging did not significantly change the score.

# %%
if merges:
    stored = "nf4" if run.memory == "low" else "bf16"
    lines["merged"] = predict_val(lambda: load_base(stored, str(shipped)), run.folder / "merged.jsonl",
                                  weights=parity.files_hash(shipped), precision=stored)
    metrics = reports.write_metrics(run.folder, lines, truth)
    scored = [metrics["scores"][name]["per_picture"] for name in ("merged", "fine-tuned")]
    change = evaluate.with_interval(evaluate.paired_bootstrap(*scored)["difference"])
    same = sum(a["boxes"] == b["boxes"] for a, b in zip(predictions, lines["merged"], strict=True))
    print(f"merged minus as trained: {change} mean IoU; the same boxes in {same} of {len(truth)} pictures")

# %% [markdown]
# ## 11 · Summary
#
# The scores once more, where everything is, and what each step took. The notebooks in `notebooks/` go deeper: what the
# errors have in common (04), what quantization costs (06), where the time goes (07), how to serve the result (08).

# %%
print(f"{run.recipe} at scale {run.scale}, seed {run.seed}, mean IoU on val:")
for name, score in metrics["scores"].items():
    print(f"  {name}: {evaluate.with_interval(score['summary']['mean_iou'])}{evaluate.unstopped_note(score)}")
print(f"predictions, metrics and figures: {run.folder}", f"the model to use: {shipped}", sep="\n")
processes.leave()
pd.json_normalize([*runs.report(run).values()], sep=": ").set_axis([*runs.report(run)]).T
