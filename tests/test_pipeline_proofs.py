"""Each proof in the pipeline, broken in the pipeline's own source: the run stops and says why."""

import pytest
from pipeline_runner import run

from helpers import merge

pytestmark = pytest.mark.slow


def stops(words: str, *edits: tuple[str, str], recipe: str = "r4-joint") -> None:
    with pytest.raises(ValueError, match=words):
        run(f"recipe={recipe}", "train_limit=48", "learning_rate=0.01", edits=edits)


def test_a_quantized_vision_tower():
    stops(r"model\.visual.* is NF4 and should not be", ('["model.visual", "lm_head"]', '["visual", "lm_head"]'))


def test_a_tower_that_should_train_and_does_not():
    stops("no weights of the vision tower train",
          ("target_modules=stage.lora_targets", 'target_modules=stage.lora_targets.replace("visual", "vision")'))


def test_a_tower_that_trains_and_should_not():
    stops("of the vision tower train, and this stage trains language alone",
          ("return get_peft_model(base, lora)",
           "tuned = get_peft_model(base, lora)\n    base.model.visual.requires_grad_(True)\n    return tuned"),
          recipe="r1-llm-only")


def test_trainable_weights_in_bf16():
    stops("trains in torch.bfloat16", ("model.trainable_to_fp32(tuned)", "pass"))


def test_bf16_weights_in_the_vision_recipe():
    stops("trains in torch.bfloat16", ("model.trainable_to_fp32(tuned)", "pass"),
          ("base.model.visual.float().requires_grad_(True)", "base.model.visual.bfloat16().requires_grad_(True)"),
          recipe="r2-vision-only")


def test_an_end_token_outside_the_labels():
    stops(r"no <\|im_end\|> in its labels",
          ("collator = collate.Collator(processor, run.prompt, run.loss_scope)",
           'processor.chat_template = processor.chat_template.replace("<|im_end|>", "")\n'
           "collator = collate.Collator(processor, run.prompt, run.loss_scope)"))


def test_adapter_keys_that_find_no_place():
    rename = """from safetensors.torch import load_file, save_file
    file = run.folder / "adapter" / "adapter_model.safetensors"
    weights = {name.replace("visual", "vision"): weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    parity.write(file.parent, made_with, parity.base_of(last.base))
    """
    predicts = "predictions = predict_val(load_trained"
    stops("keys fit only the file or only the model", (predicts, rename + predicts))


def test_a_merge_that_forgets_the_adapter():
    stops("the merge is wrong",
          ("merged, difference = merge.merge_adapter(adapted, batch)",
           "adapted.merge_and_unload = lambda **kwargs: adapted.unload()\n"
           "    merged, difference = merge.merge_adapter(adapted, batch)"))


def test_a_merged_file_that_differs(monkeypatch):
    save_whole = merge.save_whole

    def saved_and_changed(merged, *arguments):
        save_whole(merged, *arguments)
        merged.lm_head.weight.data[0] += 1

    monkeypatch.setattr(merge, "save_whole", saved_and_changed)
    stops("is not the weight that was saved")
