"""Every test runs offline, without a GPU, on one thread, in a temporary folder of its own."""

import importlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = "PYTEST_SHARED_SCRATCH"

# Set before torch, transformers or datasets are imported; processes that a test starts inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[SCRATCH] = tempfile.mkdtemp(prefix="nutrition-tests-")
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    HF_HOME=f"{os.environ[SCRATCH]}/huggingface",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    IPYTHONDIR=f"{os.environ[SCRATCH]}/ipython",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
    WANDB_MODE="disabled",
)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: the tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)
for secret in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(secret, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one of them at the end (by minutes on two cores)."""
    longest = ("test_pipeline", "test_pipeline_commands", "test_notebooks", "test_pipeline_proofs", "test_committed",
               "test_speed", "test_trainer", "test_kill")
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--avx2", action="store_true", help="all tests take the branches of a CPU with AVX2 alone")


@pytest.fixture(scope="session", autouse=True)
def chosen_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--avx2` a CPU with AVX2 alone, in this process; else the machine's own."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--avx2"):
            show_avx2(patch)
        yield


def pytest_collection_finish() -> None:
    """What a fixture of a whole module writes by a relative path never lands in the repository."""
    os.chdir(os.environ[SCRATCH])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the caches that the workers shared."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ[SCRATCH], ignore_errors=True)


@pytest.fixture
def repo() -> Path:
    """The root of the repository. Read from it; never write into it."""
    return ROOT


@pytest.fixture
def as_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The functions of helpers.plots return their figure, to look into, in place of the finished picture."""
    from matplotlib import pyplot

    for module in ("charts", "photos"):
        monkeypatch.setattr(f"helpers.plots.{module}.finish", lambda figure, path=None, photos=False: figure)
    yield
    pyplot.close("all")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a run in this process sets, such as WANDB_DIR, does not reach the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path that a test writes to lies in its own temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches that a CPU with AVX2 alone takes (not how fast they are there)."""
    show_avx2(monkeypatch)


def show_avx2(patch: pytest.MonkeyPatch) -> None:
    """PyTorch and bitsandbytes see a CPU with AVX2 alone; ATEN_CPU_CAPABILITY changes neither."""
    import torch

    patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    for name in ("functional", "nn.modules", "backends.cpu.ops"):
        patch.setattr(importlib.import_module(f"bitsandbytes.{name}"), "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def processor():
    """The tiny base's processor for pictures of 16 image tokens."""
    from small_training import small_processor

    return small_processor()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A finished model's folder, to read from; `finished_model.make` makes one to change."""
    import finished_model

    return finished_model.make(tmp_path_factory.mktemp("runs") / "x-merged")


@pytest.fixture(scope="module")
def rows():
    """16 rows of the project's schema: white squares on black, a box each."""
    from small_training import squares

    return squares()
