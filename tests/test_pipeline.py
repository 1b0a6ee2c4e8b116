"""The whole pipeline, small: every recipe from photos to a model on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pipeline_runner import run
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers import evaluate, merge, predict, runs, trainer
from helpers.parity import ParityError
from helpers.settings import TINY_BASE

PREFIX = "runs/qwen2vl-nutrition-detection-"
RAN: dict[str, tuple[Path, dict]] = {}  # recipe -> where it ran, the pipeline's namespace


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """A model's weights by the names they have in memory, in bf16."""
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).state_dict()


def changed(folder: str) -> set[str]:
    """Names of the weights in which the model differs from the tiny base."""
    base = weights(TINY_BASE)
    return {name for name, weight in weights(folder).items() if not torch.equal(weight, base[name])}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(weight, others[name]) for name, weight in some.items())


def check_scores(folder: str, pictures: int = 8) -> None:
    """metrics.json follows from the two files beside it, and every picture was predicted once."""
    metrics, truth = read(f"{folder}/metrics.json"), predict.read_jsonl(Path(folder) / "truth.jsonl")
    lines = predict.read_jsonl(Path(folder) / "predictions.jsonl")
    assert [line["image_id"] for line in lines] == [row["image_id"] for row in truth] and len(truth) == pictures
    again = json.loads(json.dumps(evaluate.score(truth, lines)))
    assert metrics["scores"]["fine-tuned"] == again
    assert set(metrics["scores"]) - {"merged"} == {"fine-tuned", "base", "constant box"}


@pytest.fixture
def trained(tmp_path_factory, monkeypatch):
    """recipe -> the pipeline's namespace after it ran, once for all tests; goes into the folder where it ran."""
    def go(recipe: str) -> dict:
        if recipe not in RAN:
            RAN[recipe] = tmp_path_factory.mktemp(recipe), {}
            monkeypatch.chdir(RAN[recipe][0])
            RAN[recipe][1].update(run(f"recipe={recipe}"))
        folder, names = RAN[recipe]
        monkeypatch.chdir(folder)
        return names

    return go


@pytest.mark.parametrize("recipe", ["r1-llm-only", pytest.param("r4-joint", marks=pytest.mark.slow)])
def test_lora_recipes_end_in_a_merged_model(recipe, trained):
    names = trained(recipe)
    folder = f"{PREFIX}{recipe}"
    check_scores(folder)
    manifest = read(f"{folder}/manifest.json")
    assert manifest["recipe"] == recipe and manifest["parameters"]["max_pixels"] == names["run"].max_pixels
    assert {"train", "predictions", "merge", "merged"} <= set(manifest["timings"])
    assert manifest["peak_memory"]["host"] > 0 and "torch" in manifest["versions"]
    adapter = load_file(f"{folder}/adapter/adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in adapter.values())
    assert any("visual" in name for name in adapter) == (recipe == "r4-joint")
    for figure in ("loss", "before_after", "iou"):
        assert Path(f"{folder}/figures/{figure}.png").stat().st_size > 1000
    merged = weights(f"{folder}-merged")
    towers = {name.split(".")[1] for name in changed(f"{folder}-merged")}
    assert towers == {"language_model", *(["visual"] if recipe == "r4-joint" else [])}
    processor = Qwen2VLProcessor.from_pretrained(f"{folder}-merged")
    size = dict(processor.image_processor.size)
    assert (size["shortest_edge"], size["longest_edge"]) == (names["run"].min_pixels, names["run"].max_pixels)
    shutil.rmtree(f"{folder}-merged")
    lines = Path(f"{folder}/merged.jsonl").read_bytes()
    Path(f"{folder}/merged.jsonl").unlink()
    assert not run(f"recipe={recipe}")["trained"], "what is lost is made again, and nothing else"
    assert same(merged, weights(f"{folder}-merged"))
    assert Path(f"{folder}/merged.jsonl").read_bytes() == lines


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_another_one_is_refused(trained):
    trained("r1-llm-only")
    names = run("recipe=r1-llm-only", "merge_base=full")  # merging alone has changed
    assert names["trained"] == {}
    assert read(f"{PREFIX}r1-llm-only/manifest.json")["parameters"]["merge_base"] == "full"
    with pytest.raises(runs.ParameterError, match="learning_rate was None, now 0.01.*run_name"):
        run("recipe=r1-llm-only", "learning_rate=0.01")
    names = run("recipe=r1-llm-only", "learning_rate=0.01", "run_name=faster", "loss_scope=all-text", "precision=bf16")
    assert names["run"].folder.name.endswith("-faster") and names["trained"]
    assert names["run"].stages[0].stage.precision == "bf16" and (names["batch"]["labels"] != -100).sum() > 2 * 60


@pytest.mark.slow
def test_low_memory_merges_without_a_forward_pass_and_predicts_with_the_merged_model_in_nf4(monkeypatch):
    monkeypatch.setattr(merge, "_last_logits", lambda *arguments: pytest.fail("a forward pass to merge"))
    names = run("recipe=r4-joint", "memory=low")
    folder = f"{PREFIX}r4-joint"
    check_scores(folder)
    values = read(f"{folder}/manifest.json")["parameters"]
    assert (values["batch_size"], values["accumulation"], values["gradient_checkpointing"]) == (2, 4, True)
    assert len(trainer.read_log(Path(folder) / "log.jsonl")) == 32 // 8
    assert names["stored"] == "nf4" and "merged" in read(f"{folder}/metrics.json")["scores"]


@pytest.mark.slow
def test_constrained_decoding_and_the_best_step_by_iou():
    names = run("recipe=r1-llm-only", "constrained=True", "batch_size=8", "eval_steps=2", "eval_pictures=4",
                "keep=best", "report_to=tensorboard", "max_new_tokens=80")
    folder = Path(f"{PREFIX}r1-llm-only")
    assert not [line["rejected"] for line in names["predictions"] + names["baseline"] if line["rejected"]]
    log = [line for line in trainer.read_log(folder / "log.jsonl") if "eval_iou" in line]
    best = max(log, key=lambda line: (line["eval_iou"], -line["step"]))["step"]
    assert [line["step"] for line in log] == [2, 4]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    kept = load_file(folder / f"checkpoint-{best}" / trainer.WEIGHTS)
    assert all(torch.equal(adapter[name.replace(".default.", ".")], weight) for name, weight in kept.items())
    assert list(Path(".").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_r2_changes_the_vision_tower_alone_and_its_longest_completion_belongs_to_the_run(trained):
    with pytest.raises(runs.ParameterError, match="max_new_tokens=20 would cut completions: .* 58"):
        run("recipe=r2-vision-only", "max_new_tokens=20")
    assert not list(Path("runs").glob("*/manifest.json"))  # before the base, its completions and the training
    trained("r2-vision-only")
    folder = f"{PREFIX}r2-vision-only"
    check_scores(folder)
    assert {name.split(".")[1] for name in changed(f"{folder}/model")} == {"visual"}
    assert read(f"{folder}/model/parity.json")["max_new_tokens"] == 64
    assert run("recipe=r2-vision-only", "max_new_tokens=80")["trained"] == {}
    assert read(f"{folder}/model/parity.json")["max_new_tokens"] == 80
    with pytest.raises(ParityError, match="model was made with max_new_tokens=80 and would be used with 64"):
        run("recipe=r2-vision-only")


@pytest.mark.slow
def test_r3_runs_both_stages_on_top_of_each_other():
    run("recipe=r3-two-stage")
    check_scores(f"{PREFIX}r3-stage2")
    assert Path(f"{PREFIX}r3-stage1/model/model.safetensors").exists()
    towers = [{name: weight for name, weight in weights(PREFIX + model).items() if name.startswith("model.visual")}
              for model in ("r3-stage1/model", "r3-merged")]
    assert same(*towers)


@pytest.mark.slow
def test_r5_takes_over_what_r1_has_trained_and_goes_on_by_rewards(trained, capsys):
    trained("r1-llm-only")
    names = run("recipe=r5-reward", "reward_completions=2", "eval_steps=2", "eval_pictures=4")
    folder, labels = f"{PREFIX}r5-reward", load_file(f"{PREFIX}r1-llm-only/adapter/adapter_model.safetensors")
    assert "r5-reward-r1: taken over from runs/qwen2vl-nutrition-detection-r1-llm-only" in capsys.readouterr().out
    assert list(names["trained"]) == ["r5-reward"]
    check_scores(folder)
    assert read(f"{folder}/manifest.json")["parameters"]["reward_steps"] == 3
    log = trainer.read_log(Path(folder) / "log.jsonl")
    assert [line["step"] for line in log if "reward" in line] == [1, 2, 3]
    assert [line["step"] for line in log if "eval_iou" in line] == [2, 3]
    taken = load_file(f"{folder}-r1/adapter/adapter_model.safetensors")
    rewarded = load_file(f"{folder}/adapter/adapter_model.safetensors")
    assert same(labels, taken) and rewarded.keys() == taken.keys() and not same(rewarded, taken)
    assert Path(f"{folder}-merged/model.safetensors").exists()
    assert run("recipe=r5-reward", "reward_completions=2", "eval_steps=2", "eval_pictures=4")["trained"] == {}
    with pytest.raises(runs.ParameterError, match="reward_beta was 0.04, now 0.1.*run_name"):
        run("recipe=r5-reward", "reward_completions=2", "reward_beta=0.1")


@pytest.mark.slow
def test_base_trains_nothing_and_a_second_start_repeats_nothing(monkeypatch):
    run("recipe=base")
    check_scores(f"{PREFIX}base")
    before = read(f"{PREFIX}base/metrics.json")
    monkeypatch.setattr(predict, "predict", lambda *arguments, **options: pytest.fail("predicted again"))
    run("recipe=base")
    assert read(f"{PREFIX}base/metrics.json") == before
