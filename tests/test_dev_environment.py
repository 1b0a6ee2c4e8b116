"""pyproject.toml is the one list of dependencies; the other files follow from it."""

import ast
import re
import shutil
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.dev import environment
from helpers.dev.environment import files, requirements


def pinned(repo: Path) -> dict[str, str]:
    pins = [Requirement(pin) for pin in requirements(repo / "pyproject.toml")[2]]
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}


def test_the_written_files_are_current(repo):
    for name, text in files(repo).items():
        assert (repo / name).read_text() == text, f"{name} is stale; run make env"


def test_the_lock_with_hashes_agrees_with_the_pins_and_names_no_place(repo):
    text = (repo / "requirements.lock").read_text()
    entries = [entry for entry in re.split(r"\n(?=[a-z0-9])", text) if not entry.startswith("#")]
    locked = {canonicalize_name(entry.split("==")[0]): re.match(r"\S+?==(\S+)", entry)[1] for entry in entries}
    for name, specifier in pinned(repo).items():
        assert specifier == f"=={locked.get(name)}", f"{name}{specifier} is locked at {locked.get(name)}; run make lock"
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    left = re.sub(r"--hash=sha256:[0-9a-f]{64}|\\|# .*", "", text)
    assert not re.search(r"[/@]|--(?!hash)", left), "only names, versions, markers and hashes belong there"
    conda = yaml.safe_load((repo / "environment.lock.yml").read_text())["dependencies"][-1]["pip"][:-1]
    assert {canonicalize_name(Requirement(line).name) for line in conda} == set(locked)
    assert len(locked) > len(pinned(repo))  # what the dependencies pull in is locked too


def test_the_conda_files_are_yaml_with_the_project_itself(repo):
    for name in ("environment.yml", "environment.lock.yml"):
        content = yaml.safe_load((repo / name).read_text())
        assert content["name"] == "qwen2vl-nutrition-detection"
        assert content["channels"] == ["conda-forge"]
        assert content["dependencies"][-1]["pip"][-1] == "-e ."


def test_no_file_names_a_registry(repo):
    for name in ("pyproject.toml", "environment.yml", "environment.lock.yml", "requirements.txt", "requirements.lock"):
        assert not re.search(r"https?://|file:|index-url|find-links|prefix:", (repo / name).read_text()), name


def test_everything_that_is_imported_is_declared(repo):
    sources = [path for folder in ("helpers/**", "tests", "notebooks", ".") for path in repo.glob(f"{folder}/*.py")]
    distributions = packages_distributions()
    # asked for only where they are there: torch brings Triton on a GPU, benchmarks compare with the others
    apart = {"triton", "liger_kernel", "unsloth"}
    own = {"helpers", *apart, *(path.stem for path in repo.glob("tests/*.py"))} | set(sys.stdlib_module_names)
    missing = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            tops = {name.split(".")[0] for name in names} - own
            owners = {top: {canonicalize_name(name) for name in distributions.get(top, [top])} for top in tops}
            missing |= {f"{top} in {path.relative_to(repo)}" for top in tops if not owners[top] & set(pinned(repo))}
    assert missing == set()


def test_the_command_writes_the_files(repo, tmp_path):
    assert environment.main() == 1  # no pyproject.toml here
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(repo / name, tmp_path)
    assert environment.main() == 0
    for name in ("requirements.txt", "environment.yml", "environment.lock.yml"):
        assert (tmp_path / name).read_text() == (repo / name).read_text()


@pytest.mark.parametrize("name", ["helpers/tiny", "helpers/scenes/fonts"])
def test_the_data_files_of_the_package_are_declared(repo, name):
    text = (repo / "pyproject.toml").read_text()
    assert (repo / name).is_dir()
    assert f'"helpers.{name.split("/")[1]}"' in text
