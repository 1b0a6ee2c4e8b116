"""The model card of an exported model: its README.md with the Hub's YAML head, written from the run's own files."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from helpers import evaluate
from helpers.evaluate.reports import number, table_line, unstopped
from helpers.files import read_json
from helpers.recipes import RECIPES

HELD = {
    "bf16": "This copy holds every weight in bfloat16.",
    "nf4": "This copy holds the language model's linear layers in 4 bits (bitsandbytes' NF4 with double quantisation, "
           "in `config.json`); vision tower and head stay in bfloat16. It needs `bitsandbytes`.",
}  # fmt: skip
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Qwen2-VL, fine-tuned to answer one question about a photo of food packaging with a box around each nutrition table:

```text
{{ prompt }}
```

{{ held }} {{ size }}

## Use

```python
from PIL import Image, ImageOps
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

folder = "{{ name }}"
model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map="auto")
processor = Qwen2VLProcessor.from_pretrained(folder)
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": {{ prompt_literal }}}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
batch = processor(images=[image], text=[text], return_tensors="pt").to(model.device)
answer = model.generate(**batch, max_new_tokens={{ max_new_tokens }}, do_sample=False)
print(processor.decode(answer[0, batch["input_ids"].shape[1]:]))
```

An answer looks like `{{ example }}`: a name, then left, top, right and bottom edge in thousandths of the picture's
width and height; one such unit a table. A picture without one is answered with `no nutrition table`. Ask with the words
above, and keep the pixel budget that the processor's files hold ({{ min_pixels }} to {{ max_pixels }} pixels a picture,
{{ tokens }} image tokens): another question or budget costs accuracy without a word. `parity.json` holds both, and
hashes of tokenizer, base and weights.

## Numbers

{{ scored }}, 95 % bootstrap intervals over pictures.

{{ table }}

{{ note }}

## Data and training

{{ training }}

## Limits

{{ limits }}

## Intended use

Finding the nutrition table in a photo of food packaging, so that it can be cropped, read or checked by a person. It
does not read what the table says. Do not use it where a missed or wrong table harms somebody, such as for allergens,
without a person who looks. The question it was trained on may have cost it other abilities of its base: not measured.
"""


def model_card(copy: str, run: Path, parity: dict[str, Any], size: int, compared: dict[str, Any]) -> str:
    """README.md of the `bf16` or `nf4` copy, as text.

    `run`: a folder with manifest.json and metrics.json. `parity`: what stands in the copy's parity.json. `size`: bytes
    of its weights. `compared`: the result of `export.compare`, or {}.
    """
    manifest, metrics = read_json(run / "manifest.json"), read_json(run / "metrics.json")
    values = manifest["parameters"]
    scored_in = "nf4" if values.get("memory") == "low" and "merged" in metrics["scores"] else "bf16"
    name = manifest["run"].removesuffix("-stage2") + ("-nf4" if copy == "nf4" else "")
    shipped = next(metrics["scores"][one] for one in ("merged", "fine-tuned", "base") if one in metrics["scores"])
    card = ModelCard.from_template(
        _head(copy, name, manifest, shipped, scored_in), template_str=TEMPLATE, title=name, name=name, held=HELD[copy],
        size=f"The weights take {size / 1e9:.3g} GB." if size > 1e8 else f"The weights take {size / 1e6:.3g} MB.",
        prompt=parity["prompt"], prompt_literal=json.dumps(parity["prompt"], ensure_ascii=False),
        example=parity["box_format"].partition(" is ")[2],
        max_new_tokens=values["max_new_tokens"], min_pixels=parity["min_pixels"], max_pixels=parity["max_pixels"],
        tokens=f"{parity['min_pixels'] // 784} to {parity['max_pixels'] // 784}",
        scored=f"All {metrics['truth']['pictures']} pictures of `val`, {metrics['truth']['tables']} with a table",
        table=_table(metrics, scored_in), note=_note(copy, scored_in, compared), training=_training(manifest, parity),
        limits=_limits(manifest, shipped))
    return card.content


def _head(copy: str, name: str, manifest: dict, shipped: dict, scored_in: str) -> ModelCardData:
    """The YAML head; a base or data set that is not on the Hub is left out of it."""
    values = manifest["parameters"]
    hub = {key: values[key] if _on_hub(values[key]) else None for key in ("model_id", "dataset_id")}
    results = [
        EvalResult(task_type="object-detection", task_name="Nutrition table detection", dataset_split="val",
                   dataset_type=hub["dataset_id"] or "embedded", dataset_name=_data_words(values["dataset_id"]),
                   metric_type=kind, metric_name=words, metric_value=round(shipped["summary"][metric]["value"], 4))
        for kind, words, metric in (("iou", "mean IoU", "mean_iou"), ("f1", "F1 at IoU .5", "f1"),
                                    ("map", "AP (IoU .50 to .95)", "ap"))
        if copy == scored_in and shipped["summary"][metric]["value"] is not None  # measured with this copy's weights
    ]  # fmt: skip
    return ModelCardData(
        model_name=name, base_model=hub["model_id"], license="apache-2.0",
        datasets=[hub["dataset_id"]] if hub["dataset_id"] else None, library_name="transformers",
        pipeline_tag="image-text-to-text", eval_results=results or None,
        tags=["qwen2_vl", "object-detection", "nutrition-table", "open-food-facts", manifest["recipe"]]
             + (["bitsandbytes", "4-bit"] if copy == "nf4" else []))  # fmt: skip


def _on_hub(name: str) -> bool:
    return name != "embedded" and name.count("/") == 1 and not Path(name).exists()


def _data_words(dataset_id: str) -> str:
    if dataset_id == "embedded":
        return "rendered packaging of the project itself"
    return dataset_id if _on_hub(dataset_id) else f"local photos ({Path(dataset_id).name})"


def _table(metrics: dict, scored_in: str) -> str:
    named = {"constant box": "one box for every picture", "base": "the base, before training",
             "fine-tuned": "fine-tuned, as trained", "merged": f"**merged, in {scored_in}**"}
    lines = [table_line(["model", "n", "mean IoU", "IoU > .5", "F1", "AP"]), table_line(["---"] * 6)]
    for name in (name for name in named if name in metrics["scores"]):
        summary = metrics["scores"][name]["summary"]
        lines.append(table_line([named[name], str(summary["mean_iou"]["n"]),
                                 evaluate.with_interval(summary["mean_iou"]),
                                 number(summary["iou_over_50"]["value"], percent=True),
                                 evaluate.with_interval(summary["f1"]), evaluate.with_interval(summary["ap"])]))
    return "\n".join(lines)


def _note(copy: str, scored_in: str, compared: dict) -> str:
    if not compared and copy == scored_in:
        return ""
    if not compared:
        return f"The numbers are those of the {scored_in} weights; this copy was not scored."
    bf16, nf4 = compared["bf16"], compared["nf4"]
    return (f"bf16 and NF4 asked in turn about the same {compared['pictures']} pictures ({compared['device']}): mean "
            f"IoU {evaluate.with_interval(bf16['mean_iou'])} and {evaluate.with_interval(nf4['mean_iou'])}; NF4 minus "
            f"bf16 {evaluate.with_interval(compared['difference'])}, paired; {1000 * bf16['seconds']:.0f} and "
            f"{1000 * nf4['seconds']:.0f} ms a picture; {bf16['bytes'] / 1e6:.0f} and {nf4['bytes'] / 1e6:.0f} MB.")


def _training(manifest: dict, parity: dict) -> str:
    values, stages = manifest["parameters"], RECIPES[manifest["recipe"]]
    how = []
    for stage in stages:
        rate = values["learning_rate"] or stage.learning_rate[manifest["scale"]]
        what = (f"LoRA (rank {values['lora_rank']}, alpha {values['lora_alpha']}) on" if stage.trains == "lora"
                else "all weights of")
        held = values["precision"] if values["precision"] and stage.trains == "lora" else stage.precision
        how.append(f"{what} {' and '.join(stage.towers)}, the base held in {held}, learning rate {rate:g}, cosine")
    merged = f"; adapter merged into the {values['merge_base']} base" if stages and stages[-1].trains == "lora" else ""
    base = parity.get("base", {}).get("name", values["model_id"])
    revision = f" at `{values['model_revision']}`" if values["model_revision"] else ""
    photos = (" (Open Food Facts' photos are CC BY-SA)" if values["dataset_id"].startswith("openfoodfacts/") else "")
    lines = [
        f"- base: `{values['model_id'] if _on_hub(values['model_id']) else base}`{revision}",
        f"- data: {_data_words(values['dataset_id'])}{photos}, trained on `train`, scored once on `val`; no barcode "
        "stands in both",
        f"- recipe `{manifest['recipe']}`: {'; then '.join(how) or 'nothing was trained'}",
        f"- {values['epochs']} epochs, batch {values['batch_size']} x {values['accumulation']}, loss on "
        f"{'the answer alone' if values['loss_scope'] == 'assistant' else 'all text'}, seed {values['seed']}, "
        f"{'with' if values['augment'] else 'without'} augmentation{merged}",
        f"- {manifest['timings'].get('train', 0):.0f} s of training on {manifest['machine']}",
        f"- command `{manifest['command']}`, commit `{manifest['git']}`, "
        + ", ".join(f"{name} {manifest['versions'][name]}" for name in ("torch", "transformers", "trl", "peft")),
    ]
    return "\n".join(lines)


def _limits(manifest: dict, shipped: dict) -> str:
    summary = shipped["summary"]
    lines = [f"- tables that take {size} of the picture: mean IoU "
             f"{evaluate.with_interval(group['mean_iou_boxes'])}, n = {group['mean_iou_boxes']['n']}"
             for size, group in shipped["by_size"].items() if group["mean_iou_boxes"]["n"]]
    alarms = summary["false_alarm_rate"]
    if alarms["n"]:
        lines.append(f"- pictures without a table that got a box all the same: {100 * alarms['value']:.0f} % of "
                     f"{alarms['n']}")
    if summary["name_accuracy"]["n"]:
        lines.append(f"- the kind of table it names is right for {100 * summary['name_accuracy']['value']:.0f} % of "
                     f"{summary['name_accuracy']['n']} boxes found")
    if summary["unstopped_rate"]["value"]:
        lines.append(f"- answers cut at the token limit, because they never stopped: {unstopped(shipped)}")
    if manifest["parameters"]["dataset_id"] == "embedded":
        lines.append("- it has seen rendered packaging and no photo: a demonstration, of no use on real photos")
    return "\n".join(lines)
