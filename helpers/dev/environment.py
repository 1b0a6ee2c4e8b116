"""Write the environment files: `python -m helpers.dev.environment`.

environment.yml and requirements.txt hold what pyproject.toml asks for, environment.lock.yml every exact version that
requirements.lock (`make lock`) has settled on.
"""

import re
import sys
import tomllib
from pathlib import Path

BY = "# Written from pyproject.toml by `make env`; do not edit.\n"
LOCKED = "# Written from requirements.lock by `make env`; do not edit.\n"


def requirements(pyproject: Path) -> tuple[str, str, list[str]]:
    """(the project's name, its Python such as ">=3.11", every pinned dependency, those of the `test` extra last)."""
    project = tomllib.loads(pyproject.read_text())["project"]
    pins = project["dependencies"] + [pin for extra in project["optional-dependencies"].values() for pin in extra]
    return project["name"], project["requires-python"], pins


def files(root: Path) -> dict[str, str]:
    """The files that follow from pyproject.toml and requirements.lock in `root`, as {file name: text}."""
    name, python, pins = requirements(root / "pyproject.toml")
    exact = re.findall(r"^\S+==.*?(?= \\$)", (root / "requirements.lock").read_text(), re.M)
    return {
        "requirements.txt": BY + "\n".join([*pins, "-e ."]) + "\n",
        "environment.yml": BY + _conda(name, f"python{python}", pins),
        "environment.lock.yml": LOCKED + _conda(name, f"python{python.replace('>=', '=')}", exact),
    }


def _conda(name: str, python: str, pip: list[str]) -> str:
    lines = [f"name: {name}", "channels:", "  - conda-forge", "dependencies:", f"  - {python}", "  - pip", "  - pip:"]
    return "\n".join([*lines, *(f"      - {package}" for package in [*pip, "-e ."])]) + "\n"


def main() -> int:
    """Write the three files beside pyproject.toml in this folder."""
    if not Path("pyproject.toml").is_file():
        print("pyproject.toml is not in this folder; run this from the root of the repository.")
        return 1
    for name, text in files(Path.cwd()).items():
        Path(name).write_text(text)
        print(f"{name}: {sum('==' in line for line in text.splitlines())} versions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
