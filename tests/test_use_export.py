"""A merged model exported: both copies load as they are, the card says what the run says, bad input is one sentence."""

import ast
import re
import shutil
from pathlib import Path

import finished_model
import pytest
import torch
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers import data, evaluate, model, parity, predict
from helpers.evaluate import reports
from helpers.runs import read_json, write_json
from helpers.settings import ParameterError
from helpers.use import export
from helpers.use.export import model_card

PROMPT = finished_model.PROMPT
VALUES = {"model_id": "Qwen/Qwen2-VL-7B-Instruct", "model_revision": "abc123", "dataset_id": "someone/tables",
          "dataset_revision": None, "max_new_tokens": 48, "learning_rate": None, "lora_rank": 16, "lora_alpha": 32,
          "precision": None, "epochs": 3, "batch_size": 8, "accumulation": 1, "loss_scope": "assistant", "seed": 0,
          "augment": False, "merge_base": "dequantized", **finished_model.BUDGET}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    raw = data.load_raw("embedded", limit={"train": 1, "selection": 1, "val": 5})
    return data.prepare(raw, **finished_model.BUDGET)["val"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory, rows) -> Path:
    """A finished model with the run that made it beside it."""
    folder = finished_model.make(tmp_path_factory.mktemp("runs") / "tables-r4-joint-merged")
    run = folder.with_name("tables-r4-joint")
    truth = data.truth_rows(rows)
    lines = evaluate.constant_predictions(evaluate.best_constant_box(truth), truth)
    reports.write_metrics(run, dict.fromkeys(("fine-tuned", "base", "merged"), lines), truth)
    write_json(run / "manifest.json", {
        "run": run.name, "recipe": "r4-joint", "scale": "7b", "command": "papermill x", "git": "12345",
        "parameters": VALUES, "timings": {"train": 61.2}, "machine": "one GPU",
        "versions": dict.fromkeys(("torch", "transformers", "trl", "peft"), "1.0")})
    return folder


@pytest.fixture(scope="module")
def exported(merged) -> Path:
    merged.with_name("copies").mkdir()  # an empty folder is none that holds something else
    return export.export(merged, merged.with_name("copies"))


@pytest.fixture
def card(merged, exported, tmp_path):
    """The card of a copy of the run whose manifest has these parameters and other values."""
    def write(copy="bf16", prompt=PROMPT, size=10, parameters=None, **changed) -> str:
        run = tmp_path / changed.get("run", "tables-r4-joint")
        shutil.copytree(merged.with_name("tables-r4-joint"), run, dirs_exist_ok=True)
        manifest = read_json(run / "manifest.json") | changed
        write_json(run / "manifest.json", manifest | {"parameters": VALUES | (parameters or {})})
        return model_card(copy, run, read_json(exported / copy / "parity.json") | {"prompt": prompt}, size, {})

    return write


def load(folder: Path):
    return Qwen2VLForConditionalGeneration.from_pretrained(folder).eval(), Qwen2VLProcessor.from_pretrained(folder)


def test_both_copies_load_without_a_word_and_say_what_they_are_used_with(exported, merged):
    for copy in export.COPIES:
        vlm, processor = load(exported / copy)
        assert len(model.check_precision(vlm, copy)) == (copy == "nf4") * 28 and vlm.dtype == torch.bfloat16
        parity.check(exported / copy, parity.record(processor, PROMPT))
    before, bf16, nf4 = (folder / "model.safetensors" for folder in (merged, exported / "bf16", exported / "nf4"))
    assert bf16.read_bytes() == before.read_bytes() and nf4.stat().st_size < 0.8 * before.stat().st_size


def test_the_card_says_how_to_use_it_and_what_the_run_has_measured(exported, merged, rows, tmp_path):
    summary = read_json(merged.with_name("tables-r4-joint") / "metrics.json")["scores"]["merged"]["summary"]
    for copy in export.COPIES:
        card = ModelCard.load(exported / copy / "README.md")
        assert card.data.base_model == VALUES["model_id"] and card.data.datasets == [VALUES["dataset_id"]]
        assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-text-to-text"
        assert ("4-bit" in card.data.tags) == (copy == "nf4")
        assert evaluate.with_interval(summary["mean_iou"]) in card.text and "papermill x" in card.text
        assert "{{" not in card.text and "learning rate 2e-05" in card.text and "`abc123`" in card.text
        assert "12544 to 112896 pixels" in card.text
    results = ModelCard.load(exported / "bf16/README.md").data.eval_results
    assert {one.metric_type: one.metric_value for one in results}["iou"] == round(summary["mean_iou"]["value"], 4)
    code = re.search(r"```python\n(.*?)```", (exported / "bf16/README.md").read_text(), re.S)[1]
    (tmp_path / "tables-r4-joint").symlink_to(exported / "bf16")
    rows[0]["image"].save("photo.jpg", quality=100, subsampling=0)
    said = []
    exec(code, {"print": said.append})
    shown = rows[0] | {"image": Image.open("photo.jpg")}
    (line,) = predict.generate_lines(*load(exported / "bf16"), [shown], PROMPT, {"max_new_tokens": 48,
                                                                                "do_sample": False})
    assert said == [line["text"] + "<|im_end|>"]


def test_the_card_of_a_full_model_speaks_of_no_adapter_and_of_no_folder(card):
    values = {"dataset_id": "/home/me/secret/photos", "model_id": "embedded", "model_revision": None}
    text = card(parameters=values, recipe="r2-vision-only", run="tables-r3-stage2", size=15 * 10**9)
    assert "all weights of vision, the base stored in bf16" in text and "adapter" not in text
    assert "local photos (photos)" in text and "secret" not in text and "base_model" not in text
    assert "\n# tables-r3\n" in text and "The weights take 15 GB." in text


@pytest.mark.parametrize("copy", export.COPIES)
def test_the_cards_of_a_run_in_low_memory_say_that_its_scores_are_of_nf4(card, copy):
    text = card(copy, parameters={"memory": "low"})
    assert "merged, in nf4" in text and ("this copy was not scored" in text) == (copy == "bf16")
    assert ("model-index" in text) == (copy == "nf4")


@pytest.mark.parametrize("prompt", ['Say "where", or \'none\'.', "One line\nand {{ another }} *here*", "C:\\table?"])
def test_the_card_writes_any_prompt_so_that_it_can_be_copied(prompt, card):
    text = card(prompt=prompt)
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    (chat,) = (node.value for node in ast.walk(ast.parse(code))
               if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "chat")
    assert ast.literal_eval(chat)[0]["content"][1]["text"] == prompt
    assert f"```text\n{prompt}\n```" in text


def test_copies_are_compared_on_the_same_pictures_and_the_cards_take_it_up(exported, merged, rows):
    result = export.compare(exported, rows, batch_size=4)
    assert result["pictures"] == 5 and result["difference"]["n"] == result["bf16"]["mean_iou"]["n"] <= 5
    assert result["nf4"]["bytes"] < result["bf16"]["bytes"]
    before = (exported / "nf4/model.safetensors").stat().st_mtime_ns
    export.export(merged, exported)  # again: the weights stay, the cards are new
    assert (exported / "nf4/model.safetensors").stat().st_mtime_ns == before
    assert "bf16 and NF4 on the same 5 pictures" in (exported / "nf4/README.md").read_text()


def test_what_is_no_merged_model_in_bf16_or_has_no_run_is_refused_in_one_sentence(merged, tmp_path):
    def refused(words: str, source: Path, **more) -> None:
        with pytest.raises(ParameterError, match=words) as said:
            export.export(source, tmp_path / "out", **more)
        assert "\n" not in str(said.value) and not (tmp_path / "out").exists()

    refused("nowhere is no folder", tmp_path / "nowhere")
    other = shutil.copytree(merged, tmp_path / "other-merged")
    refused("other has no manifest.json and metrics.json.*RUN=", other)
    refused("a-run has no manifest.json", other, run=tmp_path / "a-run")
    write_json(other / "config.json", read_json(other / "config.json") | {"quantization_config": {}})
    refused("is quantized or no bf16", other)


def test_a_folder_with_something_else_in_it_stays_as_it_is(merged, exported, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ParameterError, match=r"holds something else than an export of"):
        export.export(merged, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_said_and_leaves_nothing(merged, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "save_pretrained", full)
    with pytest.raises(ParameterError, match="out cannot be written .*No space left on device.*nothing is kept"):
        export.export(merged, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_hub_is_written_only_on_demand_and_asked_before_any_work(merged, exported, monkeypatch, capsys):
    calls, words = [], [str(merged), "--output", str(exported)]

    class Hub:
        def create_repo(self, repo, **options):
            raise LocalTokenNotFoundError("Token is required\nlong story")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append((repo_id, Path(folder_path)))

    def create(self, repo, **options):
        calls.append((repo, options["private"]))
        return RepoUrl(f"https://huggingface.co/{repo}")

    export.main(words)
    monkeypatch.setattr(export, "HfApi", Hub)
    with pytest.raises(SystemExit, match="^PUSH=me/tables cannot be written on the Hub: Token is required$"):
        export.main(["nowhere", "--push", "me/tables"])
    monkeypatch.setattr(Hub, "create_repo", create)
    capsys.readouterr()
    export.main([*words, "--push", "me/tables"])
    assert calls == [("me/tables", True), ("me/tables-nf4", True),
                     ("me/tables", exported / "bf16"), ("me/tables-nf4", exported / "nf4")]
    assert capsys.readouterr().out.endswith("co/me/tables\nhttps://huggingface.co/me/tables-nf4\n")
