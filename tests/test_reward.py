"""Training by rewards: what a completion is worth, the prompt that GRPO builds, and weights that change and resume."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pipeline_runner import SOURCE
from safetensors.torch import load_file
from small_training import StopAt, load_tiny, nf4_config
from trl import GRPOConfig

from helpers import messages, model, parity, predict, reward, speed, trainer
from helpers.recipes import RECIPES
from helpers.settings import TINY_BASE

PROMPT = "Detect the bounding box of the barcode."
STAGE = RECIPES["r5-reward"][-1]


def pipelines_rewards() -> dict:
    """name -> the function that stands in pipeline.py."""
    source, names = SOURCE.read_text(), {}
    exec(source[source.index("def iou(match):") : source.index("rewards = {iou")], names)
    return {name: names[name] for name in ("iou", "count", "form")}


UPPER, LOWER = [0.1, 0.1, 0.3, 0.5], [0.6, 0.1, 0.8, 0.5]  # y first
HALF = [0.6, 0.1, 0.7, 0.5]  # of LOWER


def written(*boxes) -> str:
    return messages.target_text({"bbox": list(boxes), "category_name": ["nutrition-table"] * len(boxes)})


END = messages.END_OF_TURN
NONE = messages.NO_TABLE + END
CASES = {  # truth, completion, (iou, count, form)
    "right": ([UPPER, LOWER], written(UPPER, LOWER) + END, (1, 1, 1)),
    "right, in another order": ([UPPER, LOWER], written(LOWER) + written(UPPER) + END, (1, 1, 1)),
    "the second is missing": ([UPPER, LOWER], written(UPPER) + END, (0.5, 0, 1)),
    "one is half as high": ([UPPER, LOWER], written(UPPER, HALF) + END, (0.75, 1, 1)),
    "one is invented": ([UPPER], written(UPPER, LOWER) + END, (0.5, 0, 1)),
    "the same one twice": ([UPPER], written(UPPER, UPPER) + END, (0.5, 0, 1)),
    "another place": ([UPPER], written(LOWER) + END, (0, 1, 1)),
    "denied, and there is none": ([], NONE, (1, 1, 1)),
    "denied, and there is one": ([UPPER], NONE, (0, 0, 1)),
    "a box where there is none": ([], written(UPPER) + END, (0, 0, 1)),
    "never stopped": ([UPPER], written(UPPER), (1, 1, 0)),
    "swapped corners": ([UPPER], "<|box_start|>(500,300),(100,100)<|box_end|>" + END, (0, 0, 0)),
    "a box and half a box": ([UPPER, LOWER], written(UPPER) + "<|box_start|>(100,600)" + END, (0.5, 0, 0)),
    "chatter where there is none": ([], "I see a cat." + END, (0, 1, 0)),
    "nothing at all": ([], END, (0, 1, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_rewards_by_hand(case):
    truth, text, expected = CASES[case]
    row = {"image_id": case, "objects": {"bbox": truth, "category_name": ["nutrition-table"] * len(truth)}}
    found = reward.match(row, text)
    assert tuple(one(found) for one in pipelines_rewards().values()) == pytest.approx(expected)


def build(folder, processor, rows, start=None, nf4=False, **options):
    """A small training: 4 pictures an update, 2 completions each. `start`: a folder with the adapter it begins with."""
    vlm = speed.for_sampling(load_tiny(quantization_config=nf4_config())) if nf4 else load_tiny()
    torch.manual_seed(0)
    if start:
        vlm = model.load_adapter(vlm, start, trainable=True)
    else:
        vlm = get_peft_model(vlm, LoraConfig(r=4, target_modules=STAGE.lora_targets))
    options = {"beta": 0.04, "learning_rate": 1e-2, "save_steps": 2, "max_completion_length": 40} | options
    args = GRPOConfig(output_dir=str(folder), per_device_train_batch_size=4, num_generations=2, steps_per_generation=2,
                      gradient_accumulation_steps=2, num_train_epochs=1, shuffle_dataset=False, disable_dropout=True,
                      bf16=model.compute_dtype() == torch.bfloat16, use_cpu=True, logging_steps=1, report_to="none",
                      gradient_checkpointing=False, scale_rewards="none", **options)
    return reward.RewardTrainer(vlm, args, rows=rows, steps=5, prompt=PROMPT, rewards=[*pipelines_rewards().values()],
                                processing_class=processor, callbacks=[trainer.LossLog(folder)],
                                made_with=parity.record(processor, PROMPT), base=parity.base_of(TINY_BASE))


def test_a_killed_training_goes_on_and_equals_an_undisturbed_one(tmp_path, processor, rows):
    """5 updates of 4 pictures out of 16: the last one is of a second round through them."""
    whole = build(tmp_path / "whole", processor, rows)
    before = {name: weight.detach().clone() for name, weight in whole.model.named_parameters()}
    assert all(weight.dtype == torch.float32 for weight in whole._trainable().values())
    assert model.check_trainable(whole.model, STAGE)["language"]["trainable"] == sum(
        weight.numel() for name, weight in before.items() if ".default." in name)
    whole.train()
    changed = {name for name, weight in whole.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == set(whole._trainable()), "the adapter trains, and neither its frozen copy nor the base"
    log = trainer.read_log(tmp_path / "whole" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5] and log[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert {"reward", "rewards/iou/mean", "rewards/count/mean", "rewards/form/mean"} <= set(log[0])

    killed = build(tmp_path / "killed", processor, rows)
    killed.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = build(tmp_path / "killed", processor, rows)
    resumed.train(resume_from_checkpoint=trainer.last_checkpoint(tmp_path / "killed"))
    for name, weight in resumed._trainable().items():
        assert torch.equal(weight, whole._trainable()[name]), name
    again = trainer.read_log(tmp_path / "killed" / "log.jsonl")
    assert [line["reward"] for line in again] == [line["reward"] for line in log]

    resumed.save_result(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "ref").exists()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(weight, saved[name.replace(".default.", ".")])
               for name, weight in resumed._trainable().items())
    quantized = build(tmp_path / "nf4", processor, rows, start=tmp_path / "adapter", nf4=True)
    for name, weight in quantized._trainable().items():  # TRL would begin with weights rounded to bf16
        assert torch.equal(weight, resumed._trainable()[name]), name
        assert torch.equal(weight, quantized.model.get_parameter(name.replace(".default.", ".ref."))), name


def test_the_prompt_is_that_of_every_other_training(tmp_path, processor, rows, monkeypatch):
    """Token for token, with the same pixels, in generation and in the forward pass that the loss is computed from."""
    grpo = build(tmp_path, processor, rows)
    given = {}

    def caught(ids, images, fields, count):
        given["generation"] = ids, fields
        return [[grpo.eos_token_ids[0]]] * len(ids), None

    monkeypatch.setattr(grpo, "_generate_single_turn", caught)
    batch = [grpo.train_dataset[i] for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    grpo.model.train()
    made = grpo._generate_and_score_completions(batch)
    ours = predict.model_inputs(batch, processor, PROMPT)
    expected = [ids[mask.bool()].tolist() for ids, mask in zip(ours["input_ids"], ours["attention_mask"], strict=True)]
    ids, fields = given["generation"]
    assert [list(one) for one in ids] == expected
    assert [one[mask.bool()].tolist() for one, mask in zip(made["prompt_ids"], made["prompt_mask"], strict=True)] == (
        expected)
    for got in (fields, made):
        assert torch.equal(torch.as_tensor(got["pixel_values"]), ours["pixel_values"])
        assert torch.equal(torch.as_tensor(got["image_grid_thw"]), ours["image_grid_thw"])
    types = made["mm_token_type_ids"][:, : made["prompt_ids"].shape[1]]
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(types == 1, made["prompt_ids"] == image)
    assert len({row["image_id"] for row in batch}) == 4


def test_sampling_on_a_cpu_is_faster_by_no_other_numbers(processor, rows):
    """The weights that NF4 stands for, and each picture through the vision tower once."""
    def batch(*numbers):
        made = predict.model_inputs([rows[i] for i in numbers], processor, PROMPT)
        return {name: given for name, given in made.items() if name != "image_id"}

    vlm, encoded = load_tiny(quantization_config=nf4_config()), []
    with torch.no_grad():
        expected = vlm(**batch(0, 0, 1)).logits.float()
        fast = speed.for_sampling(vlm)
        fast.model.visual.register_forward_hook(
            lambda module, given, named, made: encoded.append(len(named["grid_thw"])), with_kwargs=True)
        off = fast(**batch(0, 0, 1)).logits.float() - expected
        assert off.norm() < 0.02 * expected.norm() and not model.nf4_layers(fast)
        for numbers in ((0, 1, 1), (0, 2)):
            fast(**batch(*numbers))
    assert encoded == [2, 2], "no picture twice, nor one that is known; all of a call that has a new one"
