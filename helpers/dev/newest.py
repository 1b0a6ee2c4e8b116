"""Run the tests against the newest libraries: `python -m helpers.dev.newest [pytest's arguments]` (`make test-newest`).

An environment of its own, .venv-newest, gets the newest release of every package that pyproject.toml names, without
its pins. At the end stands what has changed since the pins, so that a failure can be laid at a release's door.
"""

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from helpers.dev.environment import requirements

FOLDER = Path(".venv-newest")
VERSIONS = "import sys; from importlib.metadata import version; print(*(version(n) for n in sys.argv[1:]), sep='\\n')"


def install(names: list[str], python: Path) -> None:
    """Make the environment, or bring it up to date."""
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "--upgrade-strategy", "eager", "setuptools", *names], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", "."], check=True)


def changes(pins: dict[str, str], python: Path) -> list[str]:
    """`name pinned -> newest` for each package whose newest release is another than the pinned one."""
    out = subprocess.run([str(python), "-c", VERSIONS, *pins], check=True, capture_output=True, text=True).stdout
    return [f"{name} {pinned} -> {now}" for (name, pinned), now in zip(pins.items(), out.split(), strict=True)
            if now != pinned]


def main() -> int:
    """Install, run linter, type checker and tests there, say what has changed; the first failure's status."""
    pins = {one.name: str(one.specifier).removeprefix("==") for one in map(Requirement, requirements(
        Path("pyproject.toml"))[2])}
    python = FOLDER / "bin" / "python"
    install(list(pins), python)
    found = changes(pins, python)
    checks = (["ruff", "check", "."], ["mypy"], ["pytest", "--durations", "15", *sys.argv[1:]])
    failed = {words[0]: status for words in checks
              if (status := subprocess.run([str(python), "-m", *words]).returncode)}
    print("\nnewer than the pins: " + (", ".join(found) if found else "nothing"))
    print("failed: " + (", ".join(failed) if failed else "nothing"))
    return next(iter(failed.values()), 0)


if __name__ == "__main__":
    sys.exit(main())
