"""A finished model: found in runs/, checked against what it was made with, loaded; a picture read as it is shown."""

import argparse
import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from transformers import Qwen2VLProcessor

from helpers import parity, runs
from helpers.data.pictures import as_rgb, open_picture
from helpers.data.schema import DataError
from helpers.runs import read_json
from helpers.settings import ParameterError, check_architecture

RUNS = Path(__file__).parents[2] / "runs"
MAX_NEW_TOKENS = 128  # the pipeline's default, room for five boxes: of models whose parity.json has none
MAX_RATIO = 200  # the processor takes no picture whose long side is more times its short one


def newest(folder: Path = RUNS) -> Path:
    """The merged model that was made last, in `folder` or `folder/demo`. Raises ParameterError where there is none."""
    found = [*folder.glob(f"*-merged/{parity.FILE}"), *folder.glob(f"demo/*-merged/{parity.FILE}")]
    if not found:
        raise ParameterError(f"{folder} holds no merged model yet: run `make demo` first, or name one with "
                             "MODEL=folder.")
    return max(found, key=lambda path: path.stat().st_mtime).parent


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """The surroundings of a command: quiet libraries, and a fault in what was given ends it with its sentence."""
    runs.quiet_libraries()
    try:
        yield
    except (ParameterError, DataError) as error:
        sys.exit(str(error))


def first_line(error: BaseException) -> str:
    """What an error says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_port(program: str, description: str, port: int, given: list[str] | None) -> argparse.Namespace:
    """`model` (None: the newest), `host` and `port` of a program that opens a finished model at a port.

    A port that cannot be opened ends the program: before a model is loaded, which takes minutes at 7B.
    """
    parser = argparse.ArgumentParser(prog=f"python -m helpers.use.{program}", description=description)
    parser.add_argument("model", nargs="?", help="a merged model's folder; the newest in runs/ where it is left out")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, to all that it offers")
    parser.add_argument("--port", type=int, default=port)
    chosen = parser.parse_args(given)
    try:
        family = socket.AF_INET6 if ":" in chosen.host else socket.AF_INET
        socket.create_server((chosen.host, chosen.port or -1), family=family).close()  # 0 would be any port
    except (OSError, OverflowError) as error:  # taken, not allowed, no such host; no such number
        sys.exit(f"PORT={chosen.port} cannot be opened on {chosen.host} ({first_line(error)}); name another from 1 to "
                 f"65535, like PORT={port + 1}.")
    return chosen


def check(model: str | Path, bf16: bool = False) -> dict[str, Any]:
    """What is in the folder's parity.json, after a look at everything that can be wrong without loading weights.

    Raises ParameterError, one sentence: no folder, an adapter, no weights, unreadable, made with another pixel budget,
    tokenizer or format than its own processor has now, or weights that are not those that were saved; with `bf16` also
    where it is stored otherwise than a merge writes it.
    """
    folder, merged = Path(model).expanduser(), "name a merged model, such as runs/…-r4-joint-merged."
    if not folder.is_dir():
        raise ParameterError(f"MODEL={model} is no folder; run `make demo` and name none, or {merged}")
    for file, kind in (("adapter_config.json", "an adapter, which needs its base"), ("manifest.json", "a run")):
        if (folder / file).exists():
            raise ParameterError(f"MODEL={model} holds {kind}, and no model; {merged}")
    for file in ("config.json", parity.FILE, "*.safetensors"):
        if not any(folder.glob(file)):
            raise ParameterError(f"MODEL={model} has no {file}: it is no whole model of this project's; {merged}")
    try:
        made_with, config = read_json(folder / parity.FILE), read_json(folder / "config.json")
        check_architecture(f"MODEL={model}", config)
        if bf16 and ("quantization_config" in config or config["dtype"] != "bfloat16"):
            raise ParameterError(f"MODEL={model} is quantized or no bf16; name the merged model in bf16 that it was "
                                 "made from.")
        parity.check(folder, parity.record(Qwen2VLProcessor.from_pretrained(folder), made_with["prompt"]))
    except (ParameterError, parity.ParityError) as error:
        raise ParameterError(str(error)) from None
    except (OSError, ValueError, KeyError) as error:  # no right to read, a broken disk, half a file
        raise ParameterError(f"MODEL={model} cannot be read ({first_line(error)}); check its files and rights, or copy "
                             "it again.") from None
    return made_with


def load_model(model: str | Path) -> tuple[Any, Any, str]:
    """(model, processor, prompt) of a folder that `check` has passed, on all GPUs of this process or the CPU.

    In `compute_dtype`, bf16 on a GPU; a 4-bit export in what its config.json says, for transformers would cast a part
    of its other weights. Its `generation_config.max_new_tokens` is that of the run that made it.
    """
    from helpers import model as models  # imports bitsandbytes, which warns where it is not quiet yet

    made_with, folder = check(model), Path(model).expanduser()
    models.patches_as_product()
    quantized = "quantization_config" in read_json(folder / "config.json")
    loaded = models.load(folder, inference=True, dtype="auto" if quantized else models.compute_dtype(),
                         attn_implementation=models.attention(training=False), device_map=models.device_map())
    loaded.generation_config.max_new_tokens = made_with.get("max_new_tokens", MAX_NEW_TOKENS)
    return loaded.eval(), Qwen2VLProcessor.from_pretrained(folder), made_with["prompt"]


def passes_of(model: str | Path) -> int:
    """How often inference runs on a picture with the model in this folder: the run's `passes`."""
    return read_json(Path(model).expanduser() / parity.FILE).get("passes", 1)


def open_upright(source: str | Path | bytes, most: int | None = None) -> Image.Image:
    """A picture, from a path or its file's bytes, as its EXIF tag shows it, in RGB (`as_rgb`).

    Raises ValueError that says why it cannot be used: also one of more than `most` pixels, before it is decoded.
    """
    try:
        with open_picture({"bytes": source if isinstance(source, bytes) else None, "path": source}) as picture:
            if most and picture.width * picture.height > most:
                raise ValueError(f"{picture.width} x {picture.height} pixels, and {most:,} at most are taken")
            upright = as_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # Pillow's readers raise many kinds
        said = isinstance(error, ValueError | Image.UnidentifiedImageError)
        why = str(error) if said else f"{type(error).__name__}: {error}"
        raise ValueError(f"not a picture that can be read ({why})") from None
    if max(upright.size) > MAX_RATIO * min(upright.size):
        raise ValueError(f"{upright.width} x {upright.height} pixels: no side may be more than {MAX_RATIO} times the "
                         "other")
    return upright


def as_row(image_id: str, picture: Image.Image) -> dict[str, Any]:
    """A row of the schema whose boxes nobody knows, as `predict.generate_lines` takes it."""
    return {"image_id": image_id, "image": picture, "objects": {"bbox": [], "category_name": []}}


def to_pixels(box: list[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """[x0, y0, x1, y1] in 0-1 as whole pixels of a picture of `size` (width, height), one pixel wide at least."""
    x0, y0, x1, y1 = (round(edge * side) for edge, side in zip(box, (*size, *size), strict=True))
    x0, y0 = min(x0, size[0] - 1), min(y0, size[1] - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)
