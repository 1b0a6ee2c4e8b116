"""The table of all runs; seeds drawn together with pictures; the ledger ties README, results.json and runs together."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_evaluate_files import make_run

from helpers.evaluate import ledger
from helpers.evaluate.__main__ import main
from helpers.evaluate.intervals import over_seeds
from helpers.evaluate.ledger import results_table
from helpers.evaluate.seeds import group_seeds

EMPTY = f"Words.\n\n{ledger.BEGIN}\nold\n{ledger.END}\n\nMore words.\n"


def run_with(root, name, shift, seed=0, pictures=30, **parameters):
    """A scored run whose manifest says what a real one's does."""
    recipe = next(known for known in ledger.ROWS[2:] if name[:2] == known[:2])
    make_run(root, name, shift, recipe=recipe, pictures=pictures, git="abc123", machine="2 cores",
             parameters={"seed": seed, "epochs": 3} | parameters)


def test_one_seed_is_a_bootstrap_over_pictures_and_more_seeds_add_their_spread():
    draw = np.random.default_rng(0)
    pictures = draw.normal(0.6, 0.2, 200)
    alone = over_seeds(pictures[None])
    assert alone["high"] - alone["low"] == pytest.approx(2 * 1.96 * 0.2 / np.sqrt(200), rel=0.12)
    seeds = draw.normal(0, 0.05, (5, 1))
    together = over_seeds(pictures + seeds)
    spread = np.sqrt(pictures.var() / 200 + seeds.var(ddof=1) / 5)
    assert together["value"] == pytest.approx((pictures + seeds).mean())
    assert together["high"] - together["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert together["n"] == 200 and together["seeds"] == 5
    same = over_seeds(np.tile(pictures, (3, 1)))
    assert same["high"] - same["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.1)


def test_seeds_of_a_recipe_form_a_group_and_other_parameters_do_not(tmp_path):
    for name, seed in (("r4-joint", 0), ("r4-joint-s1", 1), ("r4-joint-s2", 2), ("r3-s1-stage2", 1)):
        run_with(tmp_path, name, 0.02 + 0.01 * seed, seed)
    run_with(tmp_path, "r4-joint-s3", 0.02, 3, epochs=9)
    run_with(tmp_path, "r4-joint-s4", 0.02, 1)  # a seed that is there already
    run_with(tmp_path, "r3-stage2", 0.05)
    groups = {name: [run["run"] for run in group] for name, group in group_seeds(ledger.find_runs(tmp_path)).items()}
    assert groups == {"r4-joint": ["r4-joint", "r4-joint-s1", "r4-joint-s2"], "r4-joint-s3": ["r4-joint-s3"],
                      "r4-joint-s4": ["r4-joint-s4"], "r3-stage2": ["r3-stage2", "r3-s1-stage2"]}
    table = results_table(tmp_path)
    assert "| r4-joint, 3 seeds | 30 |" in table and "| r4-joint, r4-joint-s1, r4-joint-s2 | abc123 |" in table


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two recipes, one with two seeds, in a ledger and a README."""
    root = tmp_path_factory.mktemp("written")
    for name, shift, seed in (("r4-joint", 0.01, 0), ("r4-joint-s1", 0.02, 1), ("r1-llm-only", 0.06, 0)):
        run_with(root, name, shift, seed)
    (root / "README.md").write_text(EMPTY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["table", str(root), "--write"])
    return root


@pytest.fixture
def results(written, tmp_path):
    """Of a copy: the command's arguments."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return ["table", str(tmp_path)]


def test_readme_and_ledger_hold_what_the_runs_gave(results, tmp_path, capsys):
    main([*results, "--check"])
    assert "every number" in capsys.readouterr().out
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Words.\n\n") and text.endswith("\n\nMore words.\n") and "\nold\n" not in text
    entry = json.loads((tmp_path / "results.json").read_text())["rows"]["tiny/r4-joint"]
    assert entry["run"] == ["r4-joint", "r4-joint-s1"] and entry["commit"] == ["abc123"] * 2
    assert entry["command"] == ["papermill -p recipe r4-joint"] * 2 and entry["mean_iou"]["seeds"] == 2
    assert f"| r4-joint, 2 seeds | 30 | {ledger.with_interval(entry['mean_iou'])} |" in text
    assert "- r4-joint minus r1-llm-only: " in text and "significant at 95 %, n = 30" in text


@pytest.mark.parametrize(("file", "old", "new", "said"), [
    ("README.md", "| r4-joint, 2 seeds | 30 | .", "| r4-joint, 2 seeds | 30 | 1.", "README.md says '| r4-joint, 2"),
    ("README.md", "- r4-joint minus r1-llm-only: .", "- r4-joint minus r1-llm-only: 1.", "README.md says '- r4-joint"),
    ("results.json", '"abc123"', '"def456"', "tiny/.*: commit is"),
])
def test_a_number_that_is_stale_is_named(results, tmp_path, file, old, new, said):
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match=said):
        main([*results, "--check"])


def test_a_run_that_was_made_again_makes_the_ledger_stale(results, tmp_path):
    run_with(tmp_path, "r1-llm-only", 0.2)
    with pytest.raises(SystemExit, match="tiny/r1-llm-only: mean_iou is .* the run on disk says"):
        main([*results, "--check"])
    main([*results, "--write"])
    main([*results, "--check"])


def test_the_committed_readme_shows_the_committed_ledger_of_real_runs(repo: Path):
    assert ledger.stale("nowhere", repo / "results.json", repo / "README.md") == []
    for name, entry in json.loads((repo / "results.json").read_text())["rows"].items():
        assert entry["mean_iou"]["n"] == 121, f"{name} is not of all of the embedded val"
        assert all(re.fullmatch(r"[0-9a-f]{10}", commit) for commit in entry["commit"]), name
