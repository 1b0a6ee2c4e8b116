"""Repeat a run from its manifest.json: `python -m helpers.dev.rerun runs/qwen2vl-nutrition-detection-r4-joint`.

The same parameters go into a folder beside the old one (`runs-rerun/`; another with `--into`), and the losses and
answers of both are compared. Nothing is uploaded.
"""

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from helpers.files import read_json
from helpers.trainlog import read_log

PIPELINE = Path(__file__).resolve().parents[2] / "pipeline.py"
OWN = ("gpus", "output_root", "report_to")  # belong to the machine and the moment, not to the result


def words(manifest: dict, into: Path) -> list[str]:
    """`name=value` of every parameter that the run had, for `pipeline.py`."""
    values = {name: value for name, value in manifest["parameters"].items() if value is not None and name not in OWN}
    return [*(f"{name}={value}" for name, value in values.items()), f"output_root={into}", "report_to=none"]


def differences(old: Path, new: Path) -> list[str]:
    """What is not the same in two runs' folders: inputs, losses, answers; each in a few words."""
    before, after = read_json(old / "manifest.json"), read_json(new / "manifest.json")
    found = [f"input {name} (was {value}, is {after['inputs'].get(name)})" for name, value in before["inputs"].items()
             if after["inputs"].get(name) != value]
    losses = [[(line["step"], line["loss"]) for line in read_log(folder / "log.jsonl") if "loss" in line]
              for folder in (old, new)]
    found += ["losses"] * (losses[0] != losses[1])
    for name in ("predictions.jsonl", "merged.jsonl"):
        texts = [(folder / name).read_text() if (folder / name).is_file() else "" for folder in (old, new)]
        found += [name] * (texts[0] != texts[1])
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns pipeline.py's status, or 1 where the result is another."""
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.rerun", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, with its manifest.json")
    parser.add_argument("--into", type=Path, help="output_root of the repetition")
    chosen = parser.parse_args(arguments)
    manifest = read_json(chosen.run / "manifest.json")
    if not manifest:
        print(f"{chosen.run} has no manifest.json; name the folder of a run, such as "
              "runs/qwen2vl-nutrition-detection-r4-joint.", file=sys.stderr)
        return 2
    for package, then in manifest["versions"].items():
        if version(package) != then:
            print(f"{package} was {then} and is {version(package)}: results may differ.")
    into = chosen.into or chosen.run.resolve().parent.with_name(chosen.run.resolve().parent.name + "-rerun")
    status = subprocess.run([sys.executable, str(PIPELINE), *words(manifest, into)]).returncode
    if status:
        return status
    found = differences(chosen.run, into / manifest["run"])
    print(f"{into / manifest['run']}: " + (f"not the same as before: {', '.join(found)}" if found else
                                           "the same losses and answers as before"))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
