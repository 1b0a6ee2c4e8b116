"""The benchmark, made small; and that README says what its report says."""

import json
import sys

import pytest

from helpers.dev import bench


def test_the_readme_says_what_the_report_says(repo):
    report = json.loads(bench.REPORT.read_text())
    found = bench.BLOCK.search((repo / "README.md").read_text())
    assert found and bench.summary(report) in found[0], "make bench ARGS=--write"


MADE_UP = """
import json, sys
task = json.loads(sys.argv.pop())
if task["name"] == "ours, bf16":
    sys.exit("no memory")
for number, factor in enumerate((9, 1, 1.5, 2)):  # the first turn is warm-up
    with open(task["turns"], "a") as turns, open(f"{task['data']}/order", "a") as order:
        order.write(f"{number} {task['name']}\\n")
        turns.write(json.dumps({"pictures_per_s": factor * len(task["name"]), "seconds": factor}) + "\\n")
    sys.stdin.readline()
"""


def test_variants_take_turns_and_rows_are_added_to_the_report_one_by_one(tmp_path, monkeypatch, capsys):
    """Times made up: every round has each variant once, Unsloth only where its Python is given; a failure is named."""
    shared = bench.prepare(tmp_path, "tiny") | {"data": str(tmp_path)}
    monkeypatch.setattr(bench, "prepare", lambda *_: shared)
    monkeypatch.setattr(bench, "CHILD", MADE_UP)
    shown = ["--folder", str(tmp_path), "--only"]
    assert bench.main([*shown, "stock", "pipeline", "ours, nf4", "ours, bf16"]) == 0
    said = capsys.readouterr().out
    assert "| r4-joint, stock | 7.50 (5.00–10.00) | – | – |" in said
    assert "| r4-joint, ours, as the pipeline trains | 42.00 (28.00–56.00) | – | – |" in said
    assert "ours, nf4 (nf4, 32 at once) 7.7 s." in said and "ours, bf16: no memory" in said
    order = (tmp_path / "order").read_text().splitlines()
    assert order[:4] == ["0 stock", "1 stock", "2 stock", "3 stock"]  # a group of its own without a GPU
    assert bench.main([*shown, "stock"]) == 0  # is there already
    assert (tmp_path / "order").read_text().splitlines() == order
    monkeypatch.setattr(bench, "GROUPS", (("stock", "ours, as the pipeline trains"),))
    (tmp_path / "performance_tiny.json").unlink()
    (tmp_path / "order").unlink()
    assert bench.main([*shown, "r1"]) == 0
    both = ["stock, r1", "ours, as the pipeline trains, r1"]
    assert (tmp_path / "order").read_text().splitlines() == [f"{turn} {name}" for turn in range(4) for name in both]
    capsys.readouterr()
    assert bench.main([*shown, "stock", "--minutes", "0"]) == 0
    assert "r4" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main([*shown, "r9"])
    assert "--only r9 names no variant; they are r4-joint, stock; r4-joint, ours" in capsys.readouterr().err
    monkeypatch.setattr(bench, "GROUPS", (("Unsloth", "ours, in 24 GiB"),))
    monkeypatch.setattr(bench, "ON_A_GPU", {"many_sizes"})
    (tmp_path / "unsloth.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert bench.main([*shown, "r4", "--unsloth", sys.executable]) == 0
    said = capsys.readouterr().out
    assert "| r4-joint, Unsloth | 10.50 (7.00–14.00) | 1.00 | – |" in said
    assert "| r4-joint, ours, in 24 GiB | 22.50 (15.00–30.00) | 2.14 | – |" in said  # 15 letters against 7


@pytest.mark.slow
def test_the_tiny_model_is_measured_stock_and_ours(tmp_path):
    assert bench.main(["--folder", str(tmp_path), "--only", "r4", "nf4"]) == 0
    report = json.loads((tmp_path / "performance_tiny.json").read_text())
    assert [row["name"] for row in report["train"]] == ["stock", "ours, as the pipeline trains"]
    assert [(row["name"], row["batch"]) for row in report["generation"]] == [("stock", 1), ("ours, nf4", 32)]
    for row in report["train"]:
        assert "failed" not in row, row["failed"]
        assert len(row["rounds"]) == bench.ROUNDS and 0 < row["pictures_per_s"] and len(row["losses"]) == 10
