"""What is committed with the notebooks: the same cells on both sides, complete outputs, numbers that come out again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.dev.pairs import check, find_pairs, read_notebook

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"^  ([\w -]+): (\d?\.\d+) \((\d?\.\d+) to (\d?\.\d+)\)$", re.MULTILINE)
MAX_BYTES = 1_500_000
PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|var)/|" + re.escape(str(ROOT)))


def shown(text: str) -> dict[str, tuple[float, ...]]:
    """The last cell's lines: name -> mean IoU, low and high end of its interval."""
    return {name: tuple(map(float, numbers)) for name, *numbers in LINE.findall(text)}


@pytest.fixture(scope="module")
def committed() -> dict[str, tuple[float, ...]]:
    """The headline numbers that the committed pipeline.ipynb shows."""
    outputs = [output for cell in read_notebook(ROOT / "pipeline.ipynb").cells for output in cell.get("outputs", [])]
    return shown("".join(output.get("text", "") for output in outputs))


@pytest.mark.parametrize("py", find_pairs(ROOT), ids=lambda py: py.stem)
def test_a_committed_notebook_is_paired_and_its_outputs_are_whole(py):
    assert check(py) == ""
    ipynb = py.with_suffix(".ipynb")
    ran = [cell for cell in read_notebook(ipynb).cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1)), "run make notebooks"
    outputs = [output for cell in ran for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    texts = [json.dumps({**output, "data": {kind: value for kind, value in output.get("data", {}).items()
                                            if not kind.startswith("image/")}}) for output in outputs]
    assert [found[0] for text in texts if (found := PATH.search(text))] == []
    assert ipynb.stat().st_size <= MAX_BYTES


def test_the_committed_headline_numbers_stand_in_the_results(committed):
    rows = json.loads((ROOT / "results.json").read_text())["rows"]
    for name, row in {"constant box": "constant box", "base": "base", "fine-tuned": "r4-joint"}.items():
        interval = rows[f"tiny/{row}"]["mean_iou"]
        assert interval["low"] <= committed[name][0] <= interval["high"], (name, committed[name], interval)


@pytest.mark.slow
def test_the_headline_numbers_come_out_again(repo, committed):
    assert set(committed) == {"constant box", "base", "fine-tuned", "merged"}
    ended = subprocess.run([sys.executable, str(repo / "pipeline.py"), "scale=tiny", "report_to=none"],
                           capture_output=True, text=True, timeout=3000, env=os.environ | {"MPLBACKEND": "Agg"})
    assert ended.returncode == 0, ended.stderr[-3000:]
    again = shown(ended.stdout)
    assert again["constant box"] == committed["constant box"]
    # One thread here and several there round differently, and training carries that on: the interval is the bound.
    for name in ("base", "fine-tuned", "merged"):
        assert committed[name][1] <= again[name][0] <= committed[name][2], (name, again[name], committed[name])
    assert Path("runs/qwen2vl-nutrition-detection-r4-joint-merged/model.safetensors").exists()
