"""Broken parameters to fuzz `settings.settle` with: a run or one sentence comes of each, and nothing else."""

import ast
import io
import os
import random
import string
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch  # noqa: F401  settle imports it: not in the first case's time

from helpers import settings
from helpers.parameters import PARAMETERS, ParameterError

OFFLINE = "huggingface_hub.constants.HF_HUB_OFFLINE"  # no name is looked up
PIPELINE = Path(__file__).resolve().parents[2] / "pipeline.py"
ODD = (None, True, False, -1, 0, 1, 7, 2**40, 0.5, 1e-9, float("nan"), float("inf"), "", " ", "None", "0,1",
       "r4-joint", "7b", "tiny", "auto", "best", "../x", "/proc/x", "/dev/null", "~", "~nobody/x",
       "\x00", "a" * 5000, "é\n", "x/y", [], {},
       (1, 2), b"x")


def defaults() -> dict[str, Any]:
    """The literals of the notebook's parameters cell."""
    cell = PIPELINE.read_text().split('# %% tags=["parameters"]')[1].split("# %%")[0]
    return {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in ast.parse(cell).body
            if isinstance(node, ast.Assign)}


def sets(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """What someone sets: one to five parameters, some misspelled, to anything."""
    draw = random.Random(f"parameters {seed}")
    for _ in range(count):
        given = {}
        for _ in range(draw.randrange(1, 6)):
            name = draw.choice(list(PARAMETERS))
            if draw.random() < 0.05:
                name = name[:-1] or "x"
            given[name] = draw.choice((*ODD, "".join(draw.choices(string.printable, k=draw.randrange(30)))))
        yield given


def check(given: dict[str, Any]) -> str:
    """As papermill gives them; "" where a settled run or a ParameterError of one line comes."""
    cell = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in given.items() if _literal(value))
    given = {name: value for name, value in given.items() if _literal(value)}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), mock.patch.dict(os.environ), \
            mock.patch.object(sys, "stdout", io.StringIO()), mock.patch(OFFLINE, True):
        before = Path.cwd()
        os.chdir(folder)
        try:
            run = settings.settle(defaults() | given | {"In": ["", cell]})
        except ParameterError as error:
            return "" if "\n" not in str(error) and str(error) else f"not one sentence: {str(error)!r}"
        finally:
            os.chdir(before)
    return "" if set(run.values) == set(PARAMETERS) else f"a run with the parameters {sorted(run.values)}"


def _literal(value: Any) -> bool:
    """papermill can write everything but numbers that Python has no literal for."""
    return not (isinstance(value, float) and value in (float("inf"),)) and value == value
