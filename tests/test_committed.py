"""The numbers that the committed pipeline.ipynb shows come out again when it is run again, whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

LINE = re.compile(r"^  ([\w -]+): (\d?\.\d+) \((\d?\.\d+) to (\d?\.\d+)\)$", re.MULTILINE)


def shown(text: str) -> dict[str, tuple[float, ...]]:
    """The last cell's lines: name -> mean IoU, low and high end of its interval."""
    return {name: tuple(map(float, numbers)) for name, *numbers in LINE.findall(text)}


def test_the_headline_numbers_come_out_again(repo):
    cells = json.loads((repo / "pipeline.ipynb").read_text())["cells"]
    committed = shown("".join("".join(o.get("text", [])) for cell in cells for o in cell.get("outputs", [])))
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
