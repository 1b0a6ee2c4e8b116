"""The benchmark, made small; and that README says what its report says."""

import json

import pytest

from helpers.dev import bench


def test_the_readme_says_what_the_report_says(repo):
    report = json.loads(bench.REPORT.read_text())
    found = bench.BLOCK.search((repo / "README.md").read_text())
    assert found and bench.summary(report) in found[0], "make bench ARGS=--write"


def test_rows_are_added_to_the_report_one_by_one_and_a_failure_is_named(tmp_path, monkeypatch, capsys):
    """Times made up: each variant in the order of the table, Unsloth only where its Python is given."""
    rates = {"stock": 2.0, "ours, as the pipeline trains": 6.0, "Unsloth, micro-batch 8": 3.0}

    def measure(task, folder, unsloth):
        if task["name"] not in rates:
            return {"failed": "no memory"}
        return {"pictures_per_s": rates[task["name"]], "peak_gib": None,
                "generation": {"batch": 1, "pictures": 3, "seconds": 6 / rates[task["name"]]}}

    monkeypatch.setattr(bench, "measure", measure)
    shown = ["--folder", str(tmp_path), "--only", "r4-joint"]
    assert bench.main(shown) == 0
    assert "| r4-joint, ours, as the pipeline trains | 6.00 | 3.00 | – |" in capsys.readouterr().out
    assert bench.main([*shown, "Unsloth", "--unsloth", "python"]) == 0
    said = capsys.readouterr().out
    assert "| r4-joint, Unsloth, micro-batch 2 | no memory |" in said
    assert "| r4-joint, Unsloth, micro-batch 8 | 3.00 | 1.50 | – |" in said
    assert "| stock | nf4 | 1 | 123.0 | 1.0 |" in said
    assert "| ours, as the pipeline trains | nf4 | 1 | 41.0 | 3.0 |" in said
    with pytest.raises(SystemExit):
        bench.main([*shown[:-1], "r9"])
    assert "--only r9 names no variant; they are r4-joint, stock; r4-joint, ours" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tiny_model_is_measured_stock_and_ours(tmp_path):
    assert bench.main(["--folder", str(tmp_path), "--only", "r1"]) == 0
    report = json.loads((tmp_path / "performance_tiny.json").read_text())
    assert not report["answer"], "generation is measured with r4, whose base is r1's too"
    rows = {row["name"]: row for row in report["train"]}
    assert list(rows) == ["stock, r1", "ours, as the pipeline trains, r1"]
    for row in rows.values():
        assert "failed" not in row, row["failed"]
        assert row["pictures_per_s"] > 0 and len(row["losses"]) == bench.UPDATES
