"""Write the environment files from pyproject.toml: `python -m helpers.dev.environment`.

environment.yml and requirements.txt are a function of pyproject.toml alone. environment.lock.yml names the exact
version of every package that the project's dependencies pull in, as installed where this command runs.
"""

import platform
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BY = "# Written from pyproject.toml by `make env`; do not edit.\n"


def requirements(pyproject: Path) -> tuple[str, str, list[str]]:
    """(the project's name, its Python such as ">=3.11", every pinned dependency, those of the `test` extra last)."""
    project = tomllib.loads(pyproject.read_text())["project"]
    pins = project["dependencies"] + [pin for extra in project["optional-dependencies"].values() for pin in extra]
    return project["name"], project["requires-python"], pins


def portable(pyproject: Path) -> dict[str, str]:
    """The files that follow from pyproject.toml alone, as {file name: text}."""
    name, python, pins = requirements(pyproject)
    return {
        "requirements.txt": BY + "\n".join([*pins, "-e ."]) + "\n",
        "environment.yml": BY + _conda(name, [f"python{python}", "pip"], [*pins, "-e ."]),
    }


def lock(pyproject: Path) -> str:
    """environment.lock.yml's text, from what is installed. Raises PackageNotFoundError for a missing dependency."""
    name, _, pins = requirements(pyproject)
    where = f"# Exact versions as installed on {platform.system()} {platform.machine()}.\n"
    exact = [f"{package}=={version(package)}" for package in sorted(closure(pins))]
    return BY + where + _conda(name, [f"python={platform.python_version()}", f"pip={version('pip')}"], [*exact, "-e ."])


def closure(pins: list[str]) -> set[str]:
    """The names of all packages that `pins` need here, themselves included, as their metadata say it."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(pin) for pin in pins]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for package, extra in seen if package == name}:
            seen.add((name, extra))
            found.add(name)
            for line in distribution(name).requires or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return found


def _conda(name: str, conda: list[str], pip: list[str]) -> str:
    lines = [f"name: {name}", "channels:", "  - conda-forge", "dependencies:"]
    lines += [f"  - {package}" for package in conda] + ["  - pip:"] + [f"      - {package}" for package in pip]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the three files beside pyproject.toml in this folder."""
    pyproject = Path("pyproject.toml")
    if not pyproject.is_file():
        print("pyproject.toml is not in this folder; run this from the root of the repository.")
        return 1
    try:
        texts = portable(pyproject) | {"environment.lock.yml": lock(pyproject)}
    except PackageNotFoundError as error:
        print(f"{error.name} is not installed, so it cannot be locked; run make setup first.")
        return 1
    for name, text in texts.items():
        Path(name).write_text(text)
        print(f"{name}: {text.count('==')} versions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
