"""The two studies: prompts asked and kept, collators compared over seeds."""

import json
import subprocess

import pytest
from small_training import squares
from test_evaluate_files import make_run

from helpers.dev import collators, prompts
from helpers.evaluate import ledger


def test_prompts_are_asked_once_and_compared_with_the_first(tmp_path, monkeypatch):
    rows = squares().select(range(3))
    ask = {"precisions": ("bf16",), "prompts": ("Where?", "Detect the bounding box of the nutrition table.")}
    first = prompts.measure(rows, tmp_path, max_new_tokens=4, **ask)
    assert [row["prompt"] for row in first] == list(ask["prompts"]) and first[0]["to_first"]["value"] == 0
    assert first[0]["mean_iou"]["n"] == 3 and first[1]["unstopped_rate"]["value"] == 1
    assert json.loads((tmp_path / "prompts.json").read_text()) == first
    monkeypatch.setattr(prompts, "load", None)  # nothing is loaded where every answer is there
    assert prompts.measure(rows, tmp_path, max_new_tokens=4, **ask) == first
    with pytest.raises(TypeError):
        prompts.measure(rows, tmp_path, max_new_tokens=9, **ask)
    assert list(prompts.table_of(first)["n"]) == [3, 3]


def test_each_scope_and_seed_is_one_run_of_the_pipeline(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: asked.append(command[2:]))
    collators.train("r4-joint", 2, tmp_path, ["epochs=1"])
    assert [(run[2], run[3], run[4]) for run in asked] == [
        (f"loss_scope={scope}", f"seed={seed}", f"run_name={scope}-s{seed}")
        for seed in range(2) for scope in ("assistant", "all-text")]
    assert all(run[0] == "recipe=r4-joint" and run[-1] == "epochs=1" for run in asked)


def test_collators_are_compared_over_seeds_and_shown_in_the_readme(tmp_path):
    for seed in range(3):
        make_run(tmp_path, f"assistant-s{seed}", 0.01 + 0.002 * seed, recipe="r4-joint")
        if seed < 2:
            make_run(tmp_path, f"all-text-s{seed}", 0.05 + 0.002 * seed, recipe="r4-joint")
    with pytest.raises(ValueError, match="no scored run 'all-text-s2'"):
        collators.compare(tmp_path, 3)
    make_run(tmp_path, "all-text-s2", 0.054, recipe="r4-joint")
    result = collators.compare(tmp_path, 3)
    assert result["verdict"] == "significant at 95 %" and result["difference"]["seeds"] == 3
    assert result["difference"]["value"] == pytest.approx(result["assistant"]["value"] - result["all-text"]["value"])
    assert "loss on the answer alone minus on all text (r4-joint, 3 seeds each): ." in ledger.results(
        {"collators": result})
