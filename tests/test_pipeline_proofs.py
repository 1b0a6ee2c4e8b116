"""Each proof in the pipeline, broken in the pipeline's own source: the run stops and says why."""

import pytest
from pipeline_runner import run

from helpers import merge

pytestmark = pytest.mark.slow
RENAMES = """from safetensors.torch import load_file, save_file
    file = run.folder / "adapter" / "adapter_model.safetensors"
    weights = {name.replace("visual", "vision"): weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    parity.write(file.parent, made_with, parity.base_of(last.base))
    """
IN_BF16 = ("model.trainable_to_fp32(tuned)", "pass")
MERGES, PREDICTS = "merged, difference = merge.merge_adapter(adapted, batch)", "predictions = predict_val(load_trained"
COLLATES = "collator = collate.Collator(processor, run.prompt, run.loss_scope)"
BROKEN = {  # the recipe, what the run says, edits of its source
    "a quantized vision tower": (
        "r4-joint", r"model\.visual.* is NF4 and should not be",
        ('["model.visual", "lm_head"]', '["visual", "lm_head"]')),
    "a tower that should train and does not": (
        "r4-joint", "no weights of the vision tower train",
        ("target_modules=stage.lora_targets", 'target_modules=stage.lora_targets.replace("visual", "vision")')),
    "a tower that trains and should not": (
        "r1-llm-only", "of the vision tower train, and this stage trains language alone",
        ("return get_peft_model(base, lora)",
         "tuned = get_peft_model(base, lora)\n    base.model.visual.requires_grad_(True)\n    return tuned")),
    "LoRA in bf16": ("r4-joint", "trains in torch.bfloat16", IN_BF16),
    "the vision tower in bf16": (
        "r2-vision-only", "trains in torch.bfloat16", IN_BF16,
        ("base.model.visual.float().requires_grad_(True)", "base.model.visual.bfloat16().requires_grad_(True)")),
    "an end token outside the labels": (
        "r4-joint", r"no <\|im_end\|> in its labels",
        (COLLATES, 'processor.chat_template = processor.chat_template.replace("<|im_end|>", "")\n' + COLLATES)),
    "adapter keys that find no place": (
        "r4-joint", "keys fit only the file or only the model", (PREDICTS, RENAMES + PREDICTS)),
    "a merge that forgets the adapter": (
        "r4-joint", "the merge is wrong",
        (MERGES, "adapted.merge_and_unload = lambda **kwargs: adapted.unload()\n    " + MERGES)),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_stops_the_run(what):
    recipe, said, *edits = BROKEN[what]
    with pytest.raises(ValueError, match=said):
        run(f"recipe={recipe}", "train_limit=48", "learning_rate=0.01", edits=edits)


def test_a_merged_file_that_differs_stops_the_run(monkeypatch):
    save_whole = merge.save_whole

    def saved_and_changed(merged, *arguments):
        save_whole(merged, *arguments)
        merged.lm_head.weight.data[0] += 1

    monkeypatch.setattr(merge, "save_whole", saved_and_changed)
    with pytest.raises(ValueError, match="is not the weight that was saved"):
        run("recipe=r4-joint", "train_limit=48")
