"""What the topic notebooks open, and the sentence that a wrong name gets."""

import json

import numpy as np
import pytest
import torch

from helpers import data, topic
from helpers.parameters import ParameterError
from helpers.settings import PROJECT, TINY_BASE


def finished(runs, name, **parameters):
    """The files that a finished LoRA run leaves, empty where their content does not matter here."""
    folder = runs / f"{PROJECT}-{name}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"parameters": {"scale": "tiny", "model_id": "embedded"}
                                                      | parameters}))  # fmt: skip
    return folder


def test_a_models_path(monkeypatch, tmp_path):
    assert topic.model_path("tiny") == topic.model_path("tiny", "embedded") == str(TINY_BASE)
    assert topic.model_path("tiny", str(TINY_BASE)) == str(TINY_BASE)
    assert topic.model_path("tiny", "someone/model") == "someone/model"
    with pytest.raises(ParameterError, match="has no config.json"):
        topic.model_path("tiny", str(tmp_path))
    with pytest.raises(ParameterError, match="'./nothing' is not a model's folder"):
        topic.model_path("tiny", "./nothing")
    with pytest.raises(ParameterError, match="scale='7b' needs a GPU"):
        topic.model_path("7b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert topic.model_path("7b") == "Qwen/Qwen2-VL-7B-Instruct"


def test_a_finished_run_by_name_and_by_folder(tmp_path):
    runs = tmp_path / "runs"
    folder = finished(runs, "r1-llm-only")
    for run in ("r1-llm-only", folder.name, str(folder)):
        assert topic.adapter_run(run, runs) == (folder, str(TINY_BASE), "tiny")
    second = finished(runs, "r3-stage2")
    assert topic.adapter_run("r3-stage2", runs) == (second, str(runs / f"{PROJECT}-r3-stage1" / "model"), "tiny")
    with pytest.raises(ParameterError, match=r"there are r1-llm-only, r3-stage2\. Make one: make run RECIPE=r1"):
        topic.adapter_run("r2-vision-only", runs)
    with pytest.raises(ParameterError, match="there are none yet"):
        topic.adapter_run("r1-llm-only", tmp_path / "elsewhere")


def test_boxes_of_a_table_and_of_other_things():
    rows = data.load_raw("embedded", limit={"train": 1, "selection": 1, "val": 6})["val"]
    for row in rows:
        table = [[x0, y0, x1, y1] for y0, x0, y1, x1 in row["objects"]["bbox"]]
        np.testing.assert_allclose(topic.boxes_of(row, "nutrition table"), np.reshape(table, (-1, 4)))
    barcodes = [topic.boxes_of(row, "barcode") for row in rows]
    assert {found.shape[1] for found in barcodes} == {4} and any(len(found) for found in barcodes)
    assert len(topic.boxes_of(rows[0], "no such thing")) == 0
