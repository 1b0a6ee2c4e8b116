"""The pipeline on data and a model from outside: a folder with faults, a mirror of the Hub, a filled cache."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from pipeline_runner import run
from tiny_exports import save_picture, write

from helpers import data, evaluate, predict
from helpers.recipes import REVISIONS
from helpers.settings import TINY_BASE

FOLDER = Path("runs/qwen2vl-nutrition-detection-r1-llm-only")


def faulty_folder(root: Path) -> None:
    """24 pictures to train on and 8 for val as an imagefolder in COCO's pixels, faults in both."""
    for split, count, start in (("train", 24, 0), ("val", 8, 100)):
        lines = []
        for number in range(start, start + count):
            save_picture(root / split / f"{number}.jpg", number, (160, 120))
            boxes = [[72, 60, 80, 48]]  # whole thousandths, as the constant box is
            if number == 103:
                boxes.append([72, 60, 0, 48])  # empty
            objects = {"bbox": boxes, "categories": [0] * len(boxes)}
            lines.append({"file_name": f"{number}.jpg", "objects": objects})
        lines.append({"file_name": "gone.jpg", "objects": {"bbox": [], "categories": []}})
        write(root / split / "metadata.jsonl", lines)
    (root / "train/7.jpg").write_bytes((root / "train/7.jpg").read_bytes()[:900])
    (root / "val/107.jpg").write_bytes(b"not a picture")
    shutil.copy(root / "val/101.jpg", root / "train/9.jpg")


@pytest.mark.slow
def test_a_folder_with_faults_and_a_mirrored_model_go_through_to_the_end():
    faulty_folder(Path("photos"))
    shutil.copytree(TINY_BASE, "mirror", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    names = run("recipe=r1-llm-only", "dataset_id=photos", "box_format=xywh-pixels", "model_id=./mirror",
                "train_limit=None", "val_limit=None", "augment=True", "batch_size=8")
    found = [json.loads(line) for line in (FOLDER / "audit.jsonl").read_text().splitlines()]
    seen = {(line["fault"], line["image_id"]) for line in found if line["fault"] != "no-table"}
    assert {("unreadable-picture", "107"), ("unreadable-picture", "7"), ("picture-in-two-splits", "9"),
            ("empty-box", "103")} < seen and len([1 for fault, name in seen if name == "gone"]) >= 1
    cleaned, raw = (json.loads((FOLDER / name).read_text()) for name in ("metrics.json", "raw/metrics.json"))
    assert (cleaned["truth"]["pictures"], raw["truth"]["pictures"]) == (7, 9)
    assert raw["scores"]["base"]["problems"]["pictures without a prediction"] == ["107", "gone"]
    constant = [scores["scores"]["constant box"]["summary"]["mean_iou"]["value"] for scores in (cleaned, raw)]
    assert constant[0] == pytest.approx(1) and constant[1] == pytest.approx((6 + 0.5) / 8)
    lines = predict.read_jsonl(FOLDER / "raw" / "predictions.jsonl")
    again = json.loads(json.dumps(evaluate.score(data.raw_truth(names["raw"]["val"]), lines)))
    assert raw["scores"]["fine-tuned"]["summary"] == again["summary"]


@pytest.mark.slow
def test_a_filled_cache_stands_in_for_the_hub():
    """Offline, by the published id at the pinned commit, as `hf download` lays the files out; `full` merging too."""
    (model_id, commit), = REVISIONS.items()
    home = Path(constants.HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}"
    shutil.copytree(TINY_BASE, home / "snapshots" / commit, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    try:
        names = run("recipe=r1-llm-only", f"model_id={model_id}", "merge_base=full", "batch_size=16")
    finally:
        shutil.rmtree(home)
    assert names["run"].model_revision == commit and names["run"].model_path == model_id
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    assert manifest["parameters"]["model_revision"] == commit
    assert Path(f"{FOLDER}-merged/model.safetensors").is_file()
