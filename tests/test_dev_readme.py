"""What the README says against what is there."""

import ast
import re
from pathlib import Path

from helpers.dev.pairs import read_script
from helpers.parameters import PARAMETERS
from helpers.recipes import DISK_GIB, GPU_GIB, LOW_GPU_GIB, LOW_MEMORY, RECIPES, SCALES


def table_rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the rows below `heading` that begin with a name in backquotes."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
            if re.match(r"\| `", line)]


def test_every_make_command_is_a_target(repo: Path):
    text, makefile = (repo / "README.md").read_text(), (repo / "Makefile").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)) + "\n".join(re.findall(r"`(make [^`]*)`", text))
    used = {words[0] for line in re.findall(r"^make ([^#\n]*)", blocks, re.M)
            if (words := [word for word in line.split() if re.fullmatch(r"[a-z][a-z-]*", word)])}
    assert {"demo", "test", "run", "recipes", "table", "compare", "lab", "sync", "notebooks", "env"} <= used
    assert used <= set(re.findall(r"^([a-z-]+):", makefile, re.M))


def test_the_configuration_table_names_every_parameter_with_its_defaults(repo: Path):
    rows = table_rows((repo / "README.md").read_text(), "Configuration")
    cells = read_script(repo / "pipeline.py").cells
    parameters = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    defaults = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(parameters).body}
    assert [row[0].strip("`") for row in rows] == list(defaults) and set(defaults) == set(PARAMETERS)
    for name, default, large, tiny, _ in rows:
        name = name.strip("`")
        assert ast.literal_eval(default.strip("`")) == defaults[name], name
        for said, scale in ((large, "7b"), (tiny, "tiny")):
            if name in SCALES[scale]:
                expected = SCALES[scale][name]
                said = said.strip("`").replace("28²", "28 * 28")
                assert (said if isinstance(expected, str) else eval(said, {})) == expected, f"{name} at {scale}"


def test_the_hardware_table_says_what_a_run_asks_for(repo: Path):
    text = (repo / "README.md").read_text()
    rows = {row[0].strip("`"): row[1:4] for row in table_rows(text, "Hardware")}
    assert rows == {name: [f"{gib} GiB" for gib in (GPU_GIB[name], LOW_GPU_GIB[name], DISK_GIB["7b"][name])]
                    for name in RECIPES}
    low = LOW_MEMORY["7b"]
    assert f"batches of {low['batch_size']} × {low['accumulation']}" in text


def test_the_tree_names_everything_in_helpers_and_nothing_else(repo: Path):
    tree = re.search(r"```\n(pipeline\.ipynb.*?)```", (repo / "README.md").read_text(), re.S)[1]
    named = set(re.findall(r"(\w+(?:\.py|/))(?=\s)", tree.split("helpers/\n")[1].split("tests/")[0]))
    there = {path.name + ("/" if path.is_dir() else "") for path in (repo / "helpers").iterdir()
             if path.name not in ("__init__.py", "__pycache__")}
    assert named == there
    for name in re.findall(r"^([\w.]+(?:/|\.\w+))", tree, re.M):
        assert (repo / name).exists() or name == "runs/", name
