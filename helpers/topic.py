"""What the topic notebooks open: a model by scale or id, a finished run by name; refused in one sentence."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from helpers.boxes import area, yxyx_unit_to_xyxy_unit
from helpers.parameters import ParameterError
from helpers.recipes import SCALES
from helpers.scenes import render_scene
from helpers.settings import PROJECT, local_model, run_folder

RUNS = Path(__file__).parents[1] / "runs"
MAKE_ONE = "make run RECIPE=r1-llm-only SCALE=tiny"


def model_path(scale: str, model_id: str | None = None) -> str:
    """What `from_pretrained` takes: `model_id`, or the scale's own model where it is None.

    Raises ParameterError where 7B finds no GPU, or a folder holds no model.
    """
    if scale == "7b":
        import torch

        if not torch.cuda.is_available():
            raise ParameterError("scale='7b' needs a GPU, and this machine shows none; take scale='tiny'.")
    model_id = model_id or SCALES[scale]["model_id"]
    return local_model(model_id) or model_id


def adapter_run(run: str, runs: Path = RUNS) -> tuple[Path, str, str]:
    """A finished LoRA run by name or folder: its folder, the path of the base that it was trained on, its scale.

    Raises ParameterError that names the runs there are, and the command that makes one.
    """
    folder = run_folder(run, "adapter/adapter_config.json", runs)
    if folder is None:
        found = sorted(path.parents[1].name.removeprefix(f"{PROJECT}-") for path in runs.glob("*/adapter/*_config.json")
                       if path.name == "adapter_config.json")  # fmt: skip
        raise ParameterError(f"run={run!r} is no finished LoRA run; there are {', '.join(found) or 'none yet'}. "
                             f"Make one: {MAKE_ONE}.")
    values = json.loads((folder / "manifest.json").read_text())["parameters"]
    if folder.name.endswith("-stage2"):  # its base is what the first stage made
        return folder, str(folder.with_name(folder.name.removesuffix("2") + "1") / "model"), values["scale"]
    return folder, model_path(values["scale"], values["model_id"]), values["scale"]


def boxes_of(row: Mapping, name: str) -> np.ndarray:
    """True boxes [N, 4] (x first, 0-1) of `nutrition table`, or of another thing in an embedded row.

    A row knows its tables alone; what else stands on an embedded picture is known to the scene that it was drawn from.
    """
    if name == "nutrition table":
        return yxyx_unit_to_xyxy_unit(row["objects"]["bbox"])
    seed, split, index = row["meta"]["image_url"].removeprefix("embedded://scenes/").split("/")
    things = render_scene(int(seed), int(index), split).things
    found = np.array([box for thing, box in things if thing == name], dtype=float).reshape(-1, 4)
    return found[area(found) > 0]


def detector_path(scale: str, model_id: str | None = None) -> str | None:
    """What a detector is loaded from, or None for random weights, which is the tiny scale's default.

    Raises ParameterError where the 7B scale finds no GPU, or a folder holds no model.
    """
    if model_id is None and scale == "tiny":
        return None
    return model_path(scale, model_id or "PekingU/rtdetr_v2_r18vd")


def scored_run(run: str, runs: Path = RUNS) -> dict:
    """A finished run's score by name or folder, as `reports.load_score` gives it; ParameterError if there is none."""
    from helpers.evaluate import reports

    try:
        return reports.load_score(run, runs)[1]
    except (OSError, ValueError) as error:
        raise ParameterError(f"run={run!r}: {error}") from None
