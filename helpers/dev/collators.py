"""Does it matter what the loss looks at? The answer alone against all text, several seeds, the same pictures.

python -m helpers.dev.collators [--seeds 3] [--recipe r4-joint] [--folder runs/collators] [name=value ...]

Runs pipeline.py for each seed with `loss_scope=assistant` and `loss_scope=all-text`; `name=value` goes to each of them
(`epochs=1`). A run that was stopped goes on when the command is given again, one that is finished is not repeated.
Prints the paired difference over seeds and pictures, and keeps it in `results.json`, where `make table ARGS=--check`
looks and the README's results take it from.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from helpers import runs
from helpers.evaluate.intervals import over_seeds, significance
from helpers.evaluate.reports import find_runs
from helpers.evaluate.seeds import difference_over_seeds, iou_matrix

PIPELINE = Path(__file__).resolve().parents[2] / "pipeline.py"
SCOPES = ("assistant", "all-text")


def train(recipe: str, seeds: int, folder: Path, parameters: list[str]) -> None:
    """One run of the pipeline for each scope and seed; raises CalledProcessError where one fails."""
    for seed in range(seeds):
        for scope in SCOPES:
            print(f"{recipe}, {scope}, seed {seed}", flush=True)
            subprocess.run([sys.executable, str(PIPELINE), f"recipe={recipe}", "scale=tiny", f"loss_scope={scope}",
                            f"seed={seed}", f"run_name={scope}-s{seed}", f"output_root={folder}", "report_to=none",
                            *parameters], check=True, stdout=subprocess.DEVNULL)


def compare(folder: Path, seeds: int) -> dict:
    """`{"seeds", "recipe", "commit", "command", "assistant", "all-text", "difference", "verdict"}` of finished runs.

    The three in the middle are `over_seeds`' intervals of mean IoU; the difference is `assistant` minus `all-text`.
    Raises ValueError that names a run which is missing.
    """
    found = {run["run"].removesuffix("-stage2"): run for run in find_runs(folder)}
    groups = {scope: [f"{scope}-s{seed}" for seed in range(seeds)] for scope in SCOPES}
    missing = [name for names in groups.values() for name in names if name not in found]
    if missing:
        raise ValueError(f"{folder} has no scored run {missing[0]!r}; python -m helpers.dev.collators makes it.")
    a, b = ([found[name] for name in groups[scope]] for scope in SCOPES)
    difference = difference_over_seeds(a, b)
    return {"seeds": seeds, "recipe": a[0]["recipe"], "commit": a[0]["commit"],
            "command": [run["command"] for run in (*a, *b)],
            "assistant": over_seeds(iou_matrix(a)), "all-text": over_seeds(iou_matrix(b)),
            "difference": difference, "verdict": significance(difference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", default="r4-joint")
    parser.add_argument("--folder", type=Path, default=Path("runs/collators"))
    parser.add_argument("--ledger", type=Path, default=Path("results.json"))
    parser.add_argument("parameters", nargs="*", metavar="name=value")
    options = parser.parse_args()
    train(options.recipe, options.seeds, options.folder, options.parameters)
    result = compare(options.folder, options.seeds)
    runs.write_json(options.ledger, runs.read_json(options.ledger) | {"collators": result})
    print(json.dumps({name: result[name] for name in (*SCOPES, "difference", "verdict")}, indent=1))


if __name__ == "__main__":
    main()
