"""What it saves to decode and resize pictures once: `python -m helpers.dev.bench_pictures`.

Makes JPEGs of 12 megapixels and turns them into batches for three epochs, with the 7B scale's pixel budget: once as
they are, once through audit, cleaning and `data.prepare`. Both in one run, epoch by epoch in turn; each batch is what a
training step would get. CPU time is this process's own: it says more where others use the machine. A decode is counted
for every time that Pillow reads a large picture's data; the audit and `prepare` let the JPEG decoder scale it down.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable

import datasets
import numpy as np
import pandas as pd
from PIL import Image, JpegImagePlugin
from transformers import Qwen2VLProcessor

from helpers import collate, data, runs
from helpers.data.schema import FEATURES, empty_split
from helpers.recipes import SCALES
from helpers.settings import TINY_BASE

LARGE = 10**6  # pixels


def photos(count: int, width: int, height: int) -> datasets.Dataset:
    """`count` rows of the schema with a noisy JPEG of `width` x `height` each."""
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((width, height))
        noise = np.resize(random.integers(-12, 13, (500, 500, 3)), (height, width, 3))
        file = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        rows.append({
            "image_id": f"photo-{number}", "image": {"bytes": file.getvalue(), "path": None},
            "width": width, "height": height, "meta": {"barcode": str(number), "off_image_id": "", "image_url": ""},
            "objects": {"bbox": [[0.1, 0.2, 0.5, 0.6]], "category_id": [0], "category_name": ["nutrition-table"]},
        })  # fmt: skip
    return datasets.Dataset.from_list(rows, features=FEATURES)


class Decodes:
    """Counts how often the data of a JPEG of `LARGE` pixels or more was read, as long as it is entered."""

    def __enter__(self) -> "Decodes":
        self.count, self.before = 0, (JpegImagePlugin.JpegImageFile._open, JpegImagePlugin.JpegImageFile.load)
        opened, loaded = self.before

        def remember(picture) -> None:
            opened(picture)
            picture.size_in_file = picture.size

        def load(picture):
            self.count += bool(picture.tile) and np.prod(picture.size_in_file) >= LARGE
            return loaded(picture)

        JpegImagePlugin.JpegImageFile._open, JpegImagePlugin.JpegImageFile.load = remember, load
        return self

    def __exit__(self, *error) -> None:
        JpegImagePlugin.JpegImageFile._open, JpegImagePlugin.JpegImageFile.load = self.before


def measured(work: Callable[[], object]) -> tuple[dict[str, float], object]:
    """{"seconds", "CPU seconds", "decodes"} of `work`, and what it returned."""
    with Decodes() as decodes:
        start, cpu = time.perf_counter(), time.process_time()
        result = work()
        numbers = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - cpu}
    return numbers | {"decodes": decodes.count}, result


def compare(count: int, width: int, height: int, epochs: int) -> pd.DataFrame:
    """A row for each step and way, and one for each way's sum."""
    budget = {name: SCALES["7b"][name] for name in ("min_pixels", "max_pixels")}
    collator = collate.Collator(Qwen2VLProcessor.from_pretrained(TINY_BASE, **budget), "Where is the table?")
    raw = datasets.DatasetDict(train=photos(count, width, height), selection=empty_split(), val=empty_split())

    def epoch(rows: datasets.Dataset) -> None:
        for i in range(len(rows)):
            collator([rows[i]])

    collator([raw["train"][0]])  # the first call loads code
    once, rows = measured(lambda: data.prepare(data.clean(raw, data.audit(raw)), **budget)["train"])
    table = [{"way": "prepared once", "step": "audit and prepare", **once}]
    for number in range(1, epochs + 1):
        for way, source in (("as they are", raw["train"]), ("prepared once", rows)):
            table.append({"way": way, "step": f"epoch {number}", **measured(lambda source=source: epoch(source))[0]})
    return pd.DataFrame(table).sort_values("way", kind="stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(4000, 3000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    runs.quiet_libraries()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache  # nothing that an earlier call has prepared
        table = compare(options.pictures, *options.size, options.epochs)
    sums = table.groupby("way")[["seconds", "CPU seconds", "decodes"]].sum()
    print(table.round(2).to_string(index=False))
    print(sums.round(2).to_string())
    first, other = sums.loc["as they are"], sums.loc["prepared once"]
    print(f"{options.epochs} epochs of {options.pictures} pictures of {np.prod(options.size) / 1e6:.1f} megapixels: "
          f"{first['seconds'] / other['seconds']:.1f} x as fast prepared once, "
          f"{first['CPU seconds'] / other['CPU seconds']:.1f} x by CPU time, preparing included")


if __name__ == "__main__":
    main()
