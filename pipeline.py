# %% [markdown]
# # Teaching Qwen2-VL to draw boxes
#
# This notebook fine-tunes **Qwen2-VL-7B-Instruct** with QLoRA to find nutrition tables in photos of food packaging.
# It holds the whole way: photos → messages → tokens and labels → a quantised model → training → boxes → a score → one
# merged model on disk.
#
# It runs at two sizes through the same code. On a GPU with room it takes the real 7B model and the data set
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
recipe = "r4-joint"  # base, r1-llm-only, r2-vision-only, r3-two-stage, r4-joint
scale = "auto"  # 7b, tiny; auto: 7b where a GPU has room for the recipe, else tiny
model_id = None  # Hub id or local folder
model_revision = None  # commit, branch or tag on the Hub; None: the commit this was written for
dataset_id = None  # Hub id, local folder or file, or embedded
dataset_revision = None

# the question and what the loss looks at
prompt = "Detect the bounding box of the nutrition table."
loss_scope = "assistant"  # assistant: the answer alone; all-text: system and question too
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
precision = None  # nf4 or bf16: how the frozen base is held; None: as the recipe says
memory = None  # low: batches of 2 and merging on the CPU, so that r1 and r4 at 7B need a GPU of 16 GiB
gradient_checkpointing = None  # recompute activations instead of keeping them; None: where memory needs it
augment = None  # True: another view of each training picture in each epoch, its boxes moved with it
seed = 0
train_limit = None  # use only the first so many pictures
val_limit = None
eval_steps = None  # measure IoU on a few pictures of selection every so many steps; None: never
eval_pictures = 32  # how many
keep = "last"  # last or best: which step's weights are kept, best by that IoU

# prediction, merging
predict_batch_size = None
max_new_tokens = 128
constrained = False  # let only answers in the format through; False is the published protocol
merge_base = "dequantised"  # or full: which weights the adapter is merged into

# where and how
gpus = None  # such as "0,1"; None: all
output_root = "runs"
hf_home = None  # the Hub's downloads and caches; None: HF_HOME, else ~/.cache/huggingface
run_name = None  # None: the recipe's name
save_steps = None  # a checkpoint every so many steps
report_to = "auto"  # wandb, tensorboard, none; auto: W&B where there are credentials

# %% [markdown]
# The parameters are checked before anything heavy is imported. A misspelled name, a wrong type, a folder that cannot
# be written or a GPU that is too small stops the run here, with one sentence.

# %%
from helpers import settings

run = settings.settle(globals())
print(*(f"{name} = {value}" for name, value in run.values.items()), sep="\n")

# %%
from helpers import runs

runs.quiet_libraries()
from pathlib import Path

import pandas as pd
import torch
import transformers
from IPython.display import display
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2VLProcessor
from trl import SFTConfig

from helpers import budget, collate, data, evaluate, merge, messages, model, parity, plots, predict, speed, trainer
from helpers.augment import Augment
from helpers.evaluate import reports

transformers.set_seed(run.seed)
pd.options.display.max_colwidth = 160

# %% [markdown]
# ## 2 · Data
#
# A row is one photo with its boxes. A box is `[y_min, x_min, y_max, x_max]` in shares of the picture, from the top
# left. All sources (the Hub, your own folder, the embedded scenes) become rows of this one schema.

# %%
limit = {"train": run.train_limit, "val": run.val_limit}
with runs.main_first():
    raw = data.load_raw(run.dataset_id, revision=run.dataset_revision,
                        limit={split: n for split, n in limit.items() if n})
if run.stages and not len(raw["train"]):
    raise data.DataError(f"dataset_id={run.dataset_id!r} has no train split; only recipe=base can do without.")
raw["val"][0]

# %% [markdown]
# Photos come with faults: a box of no size, a picture stored lying on its side. The audit finds them; each rule says
# what is done. Nothing is dropped in silence: the sheet shows up to three pictures of each kind, with the boxes that
# came in, and `audit.jsonl` in the run's folder lists every finding by its id.

# %%
with runs.main_first():
    audit = data.audit(raw)
    rows = data.prepare(data.clean(raw, audit), run.min_pixels, run.max_pixels)
display(audit.table(), audit.statistics)
plots.audit_sheet(raw, audit)

# %%
truth, six = data.truth_rows(rows["val"]), rows["val"].select(range(min(6, len(rows["val"]))))
plots.gallery(six, truth, title="Six pictures of val and their true boxes")

# %% [markdown]
# Before any model, a number to beat: the one box that fits the training pictures best, given as the answer for every
# picture. Tables like to sit near the middle, so a model that scores no more than this has learned no more than that.

# %%
fitted_on = "train" if len(rows["train"]) else "val"
constant_box = evaluate.best_constant_box(data.truth_rows(rows[fitted_on]))
constant = evaluate.constant_predictions(constant_box, truth)
constant_iou = evaluate.with_interval(evaluate.score(truth, constant)["summary"]["mean_iou"])
print(f"best constant box, fitted on {fitted_on}, {constant_box.round(3)}: mean IoU {constant_iou} on val")

# %% [markdown]
# ## 3 · Messages
#
# A vision-language model answers in text, so a box must become text. Qwen2-VL has its own format for this, with whole
# thousandths of the picture's width and height, x first. Its pre-training has seen it, so we keep it.

# %%
example = rows["val"][0]
chat = messages.to_messages(example, run.prompt)
display({"prompt": chat["prompt"], "completion": chat["completion"]})

# %% [markdown]
# The parser turns such text back into boxes. It must return what went in, to half a thousandth.

# %%
answer = chat["completion"][0]["content"][0]["text"]
parsed = messages.parse_text(answer)
display({"from the text": parsed.boxes_xyxy_unit.tolist(), "truth (y first)": example["objects"]["bbox"]})

# %% [markdown]
# ## 4 · Tokens and labels
#
# The processor cuts the picture into patches of 14 × 14 pixels; 2 × 2 patches become one image token. `min_pixels` and
# `max_pixels` bound how many there are. They must be the same in training and in use, or the boxes suffer: so they are
# stored with every checkpoint and model, with the prompt and the tokenizer, and a use that differs is refused.

# %%
processor = Qwen2VLProcessor.from_pretrained(run.model_path, revision=run.model_revision,
                                             min_pixels=run.min_pixels, max_pixels=run.max_pixels)
made_with = parity.record(processor, run.prompt, run.max_new_tokens)
collator = collate.Collator(processor, run.prompt, run.loss_scope)
collate.check_limits(rows, collator, run)  # the longest answer and the longest sequence
print(collator.texts([example])[0])

# %% [markdown]
# The label mask decides what the loss sees. With `assistant` it is the answer and the `<|im_end|>` after it (that one
# token teaches the model to stop). `<|image_pad|>` repeats once for every image token.

# %%
batch = collator([row for row in six.select([0, len(six) - 1])])
display({name: list(tensor.shape) for name, tensor in batch.items()})
plots.label_mask(processor.tokenizer, batch["input_ids"][0], batch["labels"][0])

# %% [markdown]
# ## 5 · The model
#
# QLoRA holds the frozen base in 4 bits. Only the language model is quantised: the vision tower is small, and rounding
# it costs accuracy at the very start. `llm_int8_skip_modules` says so, by the names that the modules have today.

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
# `model.load` is `from_pretrained`, and stops the run where a weight is missing, unexpected or of another shape;
# `check_precision` where a layer is held otherwise than it should be. The table shows what is really NF4.

# %%
first_precision = run.stages[0].stage.precision if run.stages else run.precision or "nf4"
base = load_base(first_precision)
display(pd.Series(model.layer_kinds(model.nf4_layers(base)), name="NF4 layers", dtype=int).to_frame())
pd.DataFrame(model.parameters_by_tower(base)).T.assign(dtype=model.dtypes_by_tower(base))

# %% [markdown]
# ## 6 · The baseline
#
# What does the model answer before any training? Greedy decoding, in batches padded on the left. The answers are kept
# under a hash of everything they depend on, so four recipes ask the untrained model only once. With `constrained`
# only the names below and the digits are left to choose: the form is given.

# %%
names = data.names_in(rows["train"]) if run.constrained else None


def ask(vlm, path, **inputs):
    """Boxes for every picture of val, one JSON line each; kept if they were made with the same inputs."""
    key = runs.key(pixels=[run.min_pixels, run.max_pixels], val=runs.rows_hash(rows["val"]),
                   max_new_tokens=run.max_new_tokens, names=names, **inputs)
    with runs.exclusive(path):
        if not (runs.is_done(path.parent, path.name, key) and path.is_file()):
            vlm.set_attn_implementation(model.attention(training=False))
            with runs.timed(run.folder, path.stem):
                predict.predict(vlm, processor, rows["val"], run.prompt, path, batch_size=run.predict_batch_size,
                                key=key, names=names, max_new_tokens=run.max_new_tokens, do_sample=False)
            runs.mark_done(path.parent, path.name, key)
    return predict.read_jsonl(path)


# %%
base_hash = runs.files_hash(run.model_path, run.model_revision)
runs.open_folder(run, base=base_hash, train=runs.rows_hash(rows["train"]))
if runs.is_main():
    audit.write(run.folder / "audit.jsonl")
asked = {"base": base_hash, "revision": run.model_revision, "precision": first_precision, "prompt": run.prompt,
         "constrained": run.constrained}
kept_in = Path(run.output_root) / "baselines" / runs.key(pixels=[run.min_pixels, run.max_pixels], **asked)
baseline = ask(base, kept_in / "baseline.jsonl", **asked)
print(*(line["text"] or "(nothing)" for line in baseline[:3]), sep="\n")
del base
model.free_memory()

# %% [markdown]
# ## 7 · Training
#
# A recipe is a list of stages. A stage trains LoRA adapters on one or both towers, or the whole vision tower.

# %%
for stage_run in run.stages:
    print(stage_run.name, stage_run.stage, sep=": ")

# %% [markdown]
# `target_modules` is *one* regular expression: inside a list PEFT would match nothing, and train nothing, without a
# word. Weights that train are held in fp32 in every recipe: in bf16 a step of 1e-5 is rounded away.

# %%
def make_trainable(base, stage):
    """Adapters on the stage's towers, or the whole vision tower in fp32."""
    if stage.trains == "full":
        base.model.visual.float().requires_grad_(True)
        return base
    lora = LoraConfig(
        r=run.lora_rank,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        target_modules=stage.lora_targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


# %% [markdown]
# Three things save time, and change a number only in its last digits. On a GPU LoRA's product is added to the layer's
# output in place, and the small operations between matrix products are compiled (`speed.speed_up`). Activations are
# kept instead of recomputed (`gradient_checkpointing`) in as many layers as the longest batch leaves memory for, which
# is tried. And a vision tower that does not train encodes each picture once, instead of once an epoch.

# %%
def checkpointing(tuned):
    """Whether to recompute activations, and the layers that keep theirs all the same."""
    if run.gradient_checkpointing is not None:
        return run.gradient_checkpointing, []
    rows_of = budget.longest(rows["train"], run.share[0], run.min_pixels, run.max_pixels)
    longest = collate.Collator(processor, run.prompt, run.loss_scope)(rows_of)
    return speed.checkpointing(tuned, longest)


def training_data(stage_run, tuned, augment):
    """The rows to train on, and the collator that makes batches of them."""
    collator = collate.Collator(processor, run.prompt, run.loss_scope, augment)
    if not speed.worth_caching(stage_run.stage, run.augment, run.epochs):
        return rows["train"], collator
    cached = speed.CachedFeaturesCollator(collator, tuned, rows["train"], stage_run.folder / "features.bin",
                                          run.batch_size, workers)
    return cached.rows, cached


# %%
workers = 4 if torch.cuda.is_available() else 0  # processes that open pictures


def sft_config(stage_run, checkpointed):
    """How a stage is trained; an update is of batch_size x accumulation pictures, which all processes share."""
    batch_size, accumulation = run.share
    return SFTConfig(
        output_dir=str(stage_run.folder),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=stage_run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_grad_norm=1.0,
        bf16=model.compute_dtype() == torch.bfloat16,
        gradient_checkpointing=checkpointed,
        max_length=None,  # TRL's default of 1024 would cut image tokens
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_steps=run.save_steps,
        save_total_limit=2,
        seed=run.seed,
        report_to=run.report_to,
        run_name=stage_run.name,
        dataloader_num_workers=workers,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )


# %% [markdown]
# One stage, from the base to a result on disk. `BoxTrainer` is TRL's `SFTTrainer` with checkpoints that hold exactly
# the weights that train. Killed at any point, the same command goes on from the last whole checkpoint.

# %%
def train(stage_run, base_path):
    """Train one stage on the model at `base_path`; returns the table of what trained, per tower."""
    folder, stage = stage_run.folder, stage_run.stage
    tuned = make_trainable(load_base(stage.precision, base_path), stage)
    print(speed.speed_up(tuned))
    checkpointed, kept = checkpointing(tuned)
    augment = Augment(run.seed) if run.augment else None
    train_rows, collator = training_data(stage_run, tuned, augment)
    sft = trainer.BoxTrainer(tuned, args=sft_config(stage_run, checkpointed), train_dataset=train_rows,
                             data_collator=collator, processing_class=processor,
                             callbacks=[trainer.LossLog(folder), speed.KeepActivations(kept)],
                             made_with=made_with, base=parity.base_of(base_path, run.model_revision))
    if augment:
        sft.add_callback(augment)  # tells it the epoch
    if run.eval_steps:
        few = rows["selection"].select(range(min(run.eval_pictures, len(rows["selection"]))))
        greedy = {"max_new_tokens": run.max_new_tokens, "do_sample": False, "use_cache": True}
        sft.add_callback(trainer.IoUDuringTraining(
            sft, few, lambda batch: predict.generate_lines(tuned, processor, batch, run.prompt, greedy),
            every=run.eval_steps, batch_size=run.predict_batch_size, keep_best=run.keep == "best"))
    model.trainable_to_fp32(tuned)  # TRL has just cast LoRA to bf16
    table = model.check_trainable(tuned, stage)
    with runs.timed(folder, "train"):
        sft.train(resume_from_checkpoint=trainer.last_checkpoint(folder))
    speed.plain_rotations()
    if run.keep == "best":
        print(f"the best IoU during training, {sft.state.best_metric:.3f}, was at step {sft.load_best()}: kept")
    if runs.is_main():
        saved = folder / ("model" if stage.trains == "full" else "adapter")
        if stage.trains == "full":
            merge.save_whole(tuned, processor, saved)
        else:
            tuned.save_pretrained(saved)
            processor.save_pretrained(saved)
        parity.write(saved, made_with, sft.base)
    sft.accelerator.wait_for_everyone()
    return table


# %%
base_path, trained = run.model_path, {}
for stage_run in run.stages:
    base_key = runs.files_hash(base_path, run.model_revision)
    key = runs.key(base=base_key, train=runs.rows_hash(rows["train"]), **runs.training_values(run))
    with runs.exclusive(stage_run.folder / "training", wait=False):
        if runs.is_done(stage_run.folder, "train", key):
            print(f"{stage_run.name}: trained before with the same inputs, in {stage_run.folder}")
        else:
            trained[stage_run.name] = train(stage_run, base_path)
            runs.mark_done(stage_run.folder, "train", key)
            model.free_memory()
    if stage_run.stage.trains == "full":
        base_path = str(stage_run.folder / "model")

# %% [markdown]
# The loss of every stage. It counts the answer's tokens alone (with `assistant`), and most of those are fixed by the
# format: the curve drops fast to the level where only the digits are left to learn.

# %%
logs = {stage_run.name: trainer.read_log(stage_run.folder / "log.jsonl") for stage_run in run.stages}
if logs:
    display(plots.loss_curves(logs, smooth=9, path=run.folder / "figures" / "loss.png"))
for name, table in trained.items():
    display(name, pd.DataFrame(table).T)

# %% [markdown]
# ## 8 · Prediction
#
# The model that answers now is loaded from what was saved, the quantised base and the adapter as they were trained:
# what a later reader of the folder gets is what is scored here. Every key of the adapter file must find its place.

# %%
def load_trained():
    """The fine-tuned model as it was trained, from the files of the last stage."""
    last = run.stages[-1]
    if last.stage.trains == "full":
        return load_base("bf16", base_path)
    parity.check(last.folder / "adapter", made_with, parity.base_of(base_path, run.model_revision))
    return model.load_adapter(load_base(last.stage.precision, base_path), last.folder / "adapter")


# %%
predictions = baseline
if run.stages:
    tuned = load_trained()
    predictions = ask(tuned, run.folder / "predictions.jsonl", prompt=run.prompt, trained=key)
    del tuned
    model.free_memory()
print(*(line["text"] for line in predictions[:3]), sep="\n")

# %% [markdown]
# ## 9 · Evaluation
#
# IoU, the overlap of predicted and true box over their union, a picture; 1 is perfect, 0 is a miss or no answer.
# Each number stands with its 95 % bootstrap interval over the pictures. Three rows: the constant box, the model before
# and after training.

# %%
metrics = reports.write_metrics(
    run.folder, {"fine-tuned": predictions, "base": baseline, "constant box": constant}, truth
)
reports.metrics_table(metrics)

# %% [markdown]
# That is the cleaned truth. Against the truth as its source has it, an empty box counts as a miss and a picture that
# the audit dropped as one without an answer:

# %%
raw_truth = data.raw_truth(raw["val"])
raw_metrics = reports.write_metrics(
    run.folder / "raw", {"fine-tuned": predictions, "base": baseline, "constant box": constant}, raw_truth
)
reports.metrics_table(raw_metrics)

# %% [markdown]
# The same pictures before and after. Eyeballing is not evaluation, but it shows what kind of error is left.

# %%
plots.before_after(six, truth, baseline, predictions,
                   path=run.folder / "figures" / "before_after.png")

# %%
plots.iou_curves({"constant box": constant, "base": baseline, "fine-tuned": predictions}, truth,
                 path=run.folder / "figures" / "iou.png")

# %%
before, after = metrics["scores"]["base"], metrics["scores"]["fine-tuned"]
gain = evaluate.paired_bootstrap(after["per_picture"], before["per_picture"])["difference"]
print(f"fine-tuned minus base on the same {gain['n']} pictures: {evaluate.with_interval(gain)} mean IoU")

# %% [markdown]
# ## 10 · Merging
#
# An adapter needs its base beside it. Merging adds it into the weights, and gives one plain checkpoint to serve. Two
# statements, both measured:
#
# * **Algebra.** On one base, the adapter applied and the adapter merged give the same logits, up to rounding.
# * **What matters.** The model that ships (merged, bf16) against the model as it was trained (NF4 base + adapter):
#   their boxes, compared in pairs. With `memory="low"` it is asked in NF4, rounded once more.
#
# The adapter has learned on top of NF4's rounding. Merged into the weights that NF4 stands for (`dequantised`), it
# stays closer to the model as it was trained than merged into the `full` precision base, so that is the default. Seen
# at the tiny scale for r1, r3 and r4: the same boxes in 85 to 105 of 123 pictures, mean IoU within .01; with `full`, on
# an earlier tiny base, the same boxes in 10 to 16.

# %%
def merge_into(kind):
    """The adapter merged into the `full` precision base, or into the `dequantised` NF4 weights it was trained on."""
    dtype = torch.float32 if run.scale == "tiny" else torch.bfloat16  # 7B in fp32 would take 33 GB
    place = {"": "cpu"} if run.memory == "low" else model.device_map()
    if kind == "dequantised" and run.stages[-1].stage.precision == "nf4":
        base = load_base("nf4", base_path, place).dequantize().to(dtype)
    else:
        base = model.load(base_path, made_with, dtype=dtype, device_map=place,
                          revision=run.model_revision if base_path == run.model_path else None)
    adapted = model.load_adapter(base, run.stages[-1].folder / "adapter")
    if run.memory == "low":  # logits of a 7B model can take hours on a CPU; each layer's weights are compared
        return merge.merge_adapter(adapted, None)[0]
    merged, difference = merge.merge_adapter(adapted, batch)
    print(f"adapter applied against merged, in {dtype}: logits differ by {difference:.1e} of their size")
    merge.check_algebra(difference, dtype)
    return merged


# %%
merges = bool(run.stages) and run.stages[-1].stage.trains == "lora"
if merges and not (runs.is_done(run.folder, "merge", key + run.merge_base) and run.merged_folder.is_dir()):
    with runs.timed(run.folder, "merge"), runs.exclusive(run.merged_folder):
        if runs.is_main():
            merged = merge_into(run.merge_base)
            merge.save_whole(merged, processor, run.merged_folder)
            weights = merge.fingerprints(merged)
            del merged  # one copy in memory is enough
            merge.check_reload(weights, run.merged_folder)
            parity.write(run.merged_folder, made_with, parity.base_of(base_path, run.model_revision))
    runs.mark_done(run.folder, "merge", key + run.merge_base)
shipped = run.merged_folder if merges else run.stages[-1].folder / "model" if run.stages else run.model_path
if run.stages and runs.is_main():
    parity.note_longest(shipped, run.max_new_tokens)

# %% [markdown]
# The merged folder is loaded like any other model, by its path, and asked the same questions.

# %%
answers = {"fine-tuned": predictions, "base": baseline, "constant box": constant}
if merges:
    held = "nf4" if run.memory == "low" else "bf16"
    merged = load_base(held, run.merged_folder)
    answers["merged"] = ask(merged, run.folder / "merged.jsonl", prompt=run.prompt, trained=key,
                            merge_base=run.merge_base, precision=held)
    same = sum(a["boxes"] == b["boxes"] for a, b in zip(predictions, answers["merged"], strict=True))
    metrics = reports.write_metrics(run.folder, answers, truth)
    scored = [metrics["scores"][name]["per_picture"] for name in ("merged", "fine-tuned")]
    change = evaluate.with_interval(evaluate.paired_bootstrap(*scored)["difference"])
    print(f"merged minus as trained: {change} mean IoU; the same boxes in {same} of {len(truth)} answers")

# %% [markdown]
# ## 11 · What we learned

# %%
print(f"{run.recipe} at scale {run.scale}, seed {run.seed}, mean IoU on val:")
for name, score in metrics["scores"].items():
    print(f"  {name}: {evaluate.with_interval(score['summary']['mean_iou'])}{evaluate.unstopped_note(score)}")
print(f"predictions, metrics and figures: {run.folder}", f"the model to use: {shipped}", sep="\n")
runs.leave()
pd.DataFrame(runs.report(run))
