"""Does `make predict` keep its memory flat? Asks about many photos, and looks at the process every second.

    python -m helpers.dev.measure_many runs/qwen2vl-nutrition-detection-r4-joint-merged --pictures 5000

The photos are those of the embedded val, again and again, with one file in a thousand that is no picture.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import pandas as pd
import psutil

from helpers import data, many, runs


def write_photos(folder: Path, count: int) -> None:
    """`count` files in `folder`: hard links to the embedded photos of val, every thousandth no picture."""
    folder.mkdir()
    (folder / "photos").mkdir()
    rows = data.load_raw("embedded", limit={"train": 1, "selection": 1})["val"]
    stored = rows.cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(stored):
        (folder / f"{number}.jpeg-bytes").write_bytes(row["image"]["bytes"])
    for number in range(count):
        file = folder / "photos" / f"{number:06}.jpg"
        if number % 1000 == 999:
            file.write_text("no picture")
        else:
            file.hardlink_to(folder / f"{number % len(stored)}.jpeg-bytes")


def watch(process: subprocess.Popen, output: Path, parts: int, every: float = 1.0) -> pd.DataFrame:
    """Seconds, finished parts and resident MiB of `process`, until it ends; a line at each tenth of `parts`."""
    start, seen, told, looked_at = time.monotonic(), [], 1, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            held = looked_at.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            break
        seen.append((time.monotonic() - start, len(list(output.glob("parts/*.jsonl"))), held))
        if seen[-1][1] >= told:
            print(f"{seen[-1][1] * many.PART:>7,} pictures after {seen[-1][0]:>6.0f} s: {held:,.0f} MiB", flush=True)
            told = seen[-1][1] + max(1, parts // 10)
        time.sleep(every)
    return pd.DataFrame(seen, columns=["seconds", "parts", "MiB"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.measure_many")
    parser.add_argument("model", help="a merged model's folder")
    parser.add_argument("--pictures", type=int, default=5000)
    chosen = parser.parse_args(arguments)
    runs.quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="nutrition-many-") as scratch:
        folder = Path(scratch) / "files"
        write_photos(folder, chosen.pictures)
        output = Path(scratch) / "out"
        process = subprocess.Popen([sys.executable, "-m", "helpers.many", str(folder / "photos"), str(output),
                                    "--model", chosen.model])
        seen = watch(process, output, -(-chosen.pictures // many.PART))
        if process.wait():
            return process.returncode
    working = seen[seen["parts"] >= 1]
    early = working["MiB"][: len(working) // 4].median()
    late = working["MiB"][-(len(working) // 4) :].median()
    print(f"{chosen.pictures / seen['seconds'].iloc[-1]:.1f} pictures a second, start included; resident memory in the "
          f"first quarter {early:.0f} MiB (median), in the last {late:.0f}, {late - early:+.0f}; at most "
          f"{working['MiB'].max():.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
