"""pyproject.toml is the one list of dependencies: everything imported stands there, and the lock follows from it."""

import ast
import importlib.util
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.use import serve


def pinned(repo: Path) -> dict[str, str]:
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    pins = [*project["dependencies"], *(pin for extra in project["optional-dependencies"].values() for pin in extra)]
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, pins)}


def test_the_lock_agrees_with_the_pins_and_names_no_place(repo):
    text = (repo / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[a-z0-9])", text)
    locked = {canonicalize_name(entry.split("==")[0]): re.match(r"\S+?==(\S+)", entry)[1] for entry in entries}
    for name, specifier in pinned(repo).items():
        assert specifier == f"=={locked.get(name)}", f"{name}{specifier} is locked at {locked.get(name)}"
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    left = re.sub(r"--hash=sha256:[0-9a-f]{64}|\\", "", text)
    assert not re.search(r"[/@]|--(?!hash)", left), "only names, versions, markers and hashes belong there"
    assert len(locked) > len(pinned(repo))  # what the dependencies pull in is locked too


def test_everything_that_is_imported_is_declared(repo):
    sources = [path for folder in ("helpers/**", "tests", "notebooks", ".") for path in repo.glob(f"{folder}/*.py")]
    distributions = packages_distributions()
    # imported only where they are there: torch brings Triton on a GPU, the benchmark compares two, phones write HEIF
    apart = {"triton", "liger_kernel", "unsloth", "pillow_heif"}
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


def test_the_data_files_of_the_package_are_declared(repo):
    declared = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = [f"{package.replace('.', '/')}/{pattern}" for package in declared for pattern in declared[package]]
    shipped = {file for pattern in patterns for file in repo.glob(pattern)}
    files = [file for file in repo.glob("helpers/**/*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert files and set(files) <= shipped


def test_the_image_and_its_services_are_made_of_what_is_there(repo):
    lines = (repo / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    cuda = re.match(r"FROM nvidia/cuda:(\d+\.\d+)\.", lines[1])[1]
    assert f"\ncuda-toolkit=={cuda}." in (repo / "requirements.lock").read_text()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert copied == ["requirements.lock", "helpers"] and all((repo / source).exists() for source in copied)
    services = yaml.safe_load((repo / "compose.yaml").read_text())["services"]
    for name, port in (("server", 8000), ("page", 7860)):
        python, option, module, *rest = services[name]["command"].split()
        assert (python, option, rest) == ("python", "-m", ["--host", "0.0.0.0", "${MODEL:-}"])
        assert importlib.util.find_spec(module) and services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert services["server"]["environment"] == [serve.KEY]
