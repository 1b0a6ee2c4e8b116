"""`make predict`: a folder of photos or a data set -> JSON lines, and on request COCO results and crops.

    python -m helpers.use.photos photos/ out/ --coco --crops
    accelerate launch -m helpers.use.photos photos/ out/       # a process a GPU; each takes its share
    python -m helpers.use.photos photos/ out/ --shard 3/16     # the same by hand, such as in a job array

The work is cut into parts of 64 pictures, each one file in `out/parts`, written whole or not at all. A part that is
there is done: the same command goes on after a kill, a share that is run twice changes nothing, and whoever finds all
parts there joins them into `out/predictions.jsonl`. A part's name says which files it was made from: where a photo is
replaced under its name, its part is made anew.
"""

import argparse
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL.Image import Image

from helpers import runs
from helpers.data import DataError, load_raw
from helpers.data.pictures import escaped, files_below, is_picture, open_picture
from helpers.files import read_json, write_json, write_text
from helpers.parameters import ParameterError
from helpers.progress import progress_bar
from helpers.settings import end_with_a_word
from helpers.use import load
from helpers.use.answers import join

PART = 64  # pictures of one file: what a kill costs at most
LINE = 1024  # bytes of room a picture's answer needs, generously
# (image ids; what changes where a picture does; what opens the i-th picture or raises ValueError)
Source = tuple[list[str], list[Any], Callable[[int], Image]]


def find_pictures(source: str, split: str, output: Path) -> Source:
    """The pictures of a folder (but those that were written into `output`) or a file, else of a data set's split.

    A picture of a folder has its path in it as image_id. Raises ParameterError where there are none or none can be
    opened; `DataError` without the right to read, and that of `load_raw`.
    """
    place = Path(source).expanduser()
    if not place.exists() and source.startswith((".", "/", "~")):
        raise ParameterError(f"INPUT={source} is not there; name a folder of photos, a Hub id, or embedded.")
    found = files_below(place, links=True) if place.is_dir() else [place] if place.exists() else []
    own = output.resolve() if place.resolve() in output.resolve().parents else output.resolve() / "crops"
    found = [file for file in found if not file.parent.resolve().is_relative_to(own)]
    if place.is_dir() and not found:
        raise ParameterError(f"INPUT={source} is a folder without files; name one of photos, a Hub id, or embedded.")
    files = [file for file in found if is_picture(file)]
    if not files:
        return _of_data_set(source, split)
    _check_that_one_opens(source, files)
    if other := sorted({*found} - {*files}):
        print(f"{len(other):,} files are no pictures by name or content, such as {escaped(other[0].name)}")
    folder = place if place.is_dir() else place.parent
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None for file in files]
    return [file.relative_to(folder).as_posix() for file in files], stamps, lambda i: load.open_upright(files[i])


def _check_that_one_opens(source: str, files: list[Path]) -> None:
    for file in files:
        try:
            open_picture({"bytes": None, "path": file}).close()
            return
        except Exception as error:  # Pillow's readers raise many kinds
            why = f"{escaped(file.name)}: {error}"
    raise ParameterError(f"INPUT={source} holds no picture that can be opened: {len(files)} files, such as {why}.")


def _of_data_set(source: str, split: str) -> Source:
    import datasets

    try:
        rows = load_raw(source)
    except DataError as error:
        here = Path(source).expanduser().exists()
        raise DataError(f"INPUT={source} holds no picture files, and as a data set: {error}" if here else str(error)) \
            from None
    if split not in rows or not len(rows[split]):
        there = ", ".join(name for name in rows if len(rows[name]))
        raise ParameterError(f"INPUT={source} has no pictures in the split {split!r}; there is {there or 'none'}.")
    stored = rows[split].cast_column("image", datasets.Image(decode=False))

    def opened(i: int) -> Image:
        image = stored[i]["image"]
        return load.open_upright(image["bytes"] or image["path"])

    return list(stored["image_id"]), [stored._fingerprint] * len(stored), opened


def open_job(output: Path, job: dict[str, Any]) -> None:
    """Make `output`, or find in it the same job. Raises ParameterError for another one, or too little room."""
    (output / "parts").mkdir(parents=True, exist_ok=True)
    before = read_json(output / "job.json")
    changed = [f"{name} was {before.get(name)!r}, now {value!r}" for name, value in job.items()
               if before.get(name) != value]
    if before and changed:
        raise ParameterError(f"OUTPUT={output} holds the answers of another job ({'; '.join(changed)}); name another "
                             "folder, or delete that one.")
    need, free = job["pictures"] * 2 * LINE, shutil.disk_usage(output).free
    if free < need:
        raise ParameterError(f"OUTPUT={output} has {free / 2**20:.0f} MiB free, and {job['pictures']:,} answers may "
                             f"take {need / 2**20:.0f}; free some room, or name a folder on another disk.")
    write_json(output / "job.json", job)


def answer(model: Any, processor: Any, rows: list[dict], prompt: str) -> list[dict]:
    """`predict.generate_lines` of one batch, halved where it does not fit into memory."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    from helpers.predict import generate_lines

    try:
        return generate_lines(model, processor, rows, prompt, {"do_sample": False})
    except Exception as error:
        if len(rows) == 1 or not should_reduce_batch_size(error):
            raise
    clear_device_cache(garbage_collection=True)  # here the error, which holds on to the batch's tensors, is gone
    half = len(rows) // 2
    return answer(model, processor, rows[:half], prompt) + answer(model, processor, rows[half:], prompt)


def read_ahead(ids: list[str], opened: Callable[[int], Image], numbers: list[int],
               size: int) -> Iterator[list[tuple[str, Image | ValueError]]]:
    """Batches of `size` (image_id, picture or why there is none); while one is used, the next is decoded."""

    def read(i: int) -> tuple[str, Image | ValueError]:
        try:
            return ids[i], opened(i)
        except ValueError as error:
            return ids[i], error

    with ThreadPoolExecutor(max_workers=4) as pool:
        batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        coming = [pool.submit(read, i) for i in batches[0]]
        for following in [*batches[1:], []]:
            ready, coming = coming, [pool.submit(read, i) for i in following]
            yield [future.result() for future in ready]


def lines_of(batch: list[tuple[str, Image | ValueError]], ask: Callable[[list[dict]], list[dict]]) -> list[dict]:
    """The lines of a batch: those of `predict`, with width and height in pixels; without a picture an error."""
    whole = [(image_id, picture) for image_id, picture in batch if not isinstance(picture, ValueError)]
    answers = iter(ask([load.as_row(image_id, picture) for image_id, picture in whole]) if whole else [])
    lines = []
    for image_id, picture in batch:
        if isinstance(picture, ValueError):
            nothing: dict[str, list] = {"labels": [], "boxes": [], "confidences": [], "rejected": []}
            lines.append({"image_id": image_id, "text": "", **nothing, "stopped": False, "new_tokens": 0,
                          "width": 0, "height": 0, "error": str(picture)})
        else:
            lines.append(next(answers) | {"width": picture.width, "height": picture.height})
    return lines


def save_crops(line: dict, picture: Image, number: int, folder: Path) -> list[str]:
    """Cut the line's boxes out of `picture`, the `number`-th of all; the files' paths below `folder`."""
    name = f"{number:07}-" + re.sub(r"[^\w.-]", "_", line["image_id"])[-60:]
    files = [f"crops/{number // 1000:04}/{name}-{i}.jpg" for i in range(len(line["boxes"]))]
    for file, box in zip(files, line["boxes"], strict=True):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture.crop(load.to_pixels(box, picture.size)).save(folder / file, quality=95)
    return files


def predict_many(source: str, output: Path, model: str | Path, *, split: str = "val", coco: bool = False,
                 crops: bool = False, batch_size: int = 16, shard: tuple[int, int] = (0, 1)) -> dict[str, int] | None:
    """Ask the merged model in folder `model` about all pictures of `source`; `shard` is (which, of how many).

    Returns the counts of `join`, or None where other shards are not done yet.
    """
    made_with = load.check(model)
    ids, stamps, opened = find_pictures(source, split, output)
    open_job(output, {"model": made_with["weights"], "prompt": made_with["prompt"], "pictures": len(ids),
                      "names": runs.key(ids=ids), "crops": crops,
                      "max_new_tokens": made_with.get("max_new_tokens", load.MAX_NEW_TOKENS)})
    parts = [output / "parts" / f"{start // PART:07}-{runs.key(stamps=stamps[start : start + PART])}.jsonl"
             for start in range(0, len(ids), PART)]
    mine = range(len(parts))[shard[0] :: shard[1]]
    sizes = {number: len(range(len(ids))[number * PART : (number + 1) * PART]) for number in mine}
    todo = [number for number in mine if not parts[number].exists()]
    bar = progress_bar(sum(sizes.values()), sum(sizes.values()) - sum(sizes[number] for number in todo), "predict",
                       "picture", shown=shard[0] == 0)
    if todo:
        loaded, processor, prompt = load.load_model(model)
    for number in todo:
        numbers = list(range(len(ids))[number * PART : (number + 1) * PART])
        lines: list[dict] = []
        for batch in read_ahead(ids, opened, numbers, batch_size):
            new = lines_of(batch, lambda rows: answer(loaded, processor, rows, prompt))
            for i, (line, (_, picture)) in enumerate(zip(new, batch, strict=True)):
                if crops and not isinstance(picture, ValueError):
                    line["crops"] = save_crops(line, picture, numbers[len(lines) + i], output)
            lines += new
            bar.update(len(batch))
        write_text(parts[number], "".join(json.dumps(line) + "\n" for line in lines))
    bar.close()
    missing = sum(not part.exists() for part in parts)
    if missing:
        print(f"{missing} of {len(parts)} parts are still to come from other shards; the last of them joins all")
        return None
    return join(output, parts, coco)


def _shard(written: str | None) -> tuple[int, int]:
    """(which, of how many) from "3/16", else from a launcher's RANK and WORLD_SIZE."""
    if written is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    match = re.fullmatch(r"(\d+)/(\d+)", written)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ParameterError(f"--shard is {written!r}; give which of how many, from 1/16 to 16/16.")
    return int(match[1]) - 1, int(match[2])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.use.photos", description="Boxes for many photos.")
    parser.add_argument("input", help="a folder of photos, a photo, or a data set: a Hub id, a local one, or embedded")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="a merged model's folder; the newest in runs/ where it is left out")
    parser.add_argument("--split", default="val", help="of a data set")
    parser.add_argument("--coco", action="store_true", help="also write coco_results.json and coco_images.json")
    parser.add_argument("--crops", action="store_true", help="also cut every box out of its picture")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard", help="this share of the work alone, such as 3/16")
    chosen = parser.parse_args(arguments)
    chosen.output = chosen.output.expanduser()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore  # names that are not UTF-8
    runs.quiet_libraries()
    end_with_a_word()
    try:
        counts = predict_many(chosen.input, chosen.output, chosen.model or load.newest(), split=chosen.split,
                              coco=chosen.coco, crops=chosen.crops, batch_size=max(1, chosen.batch_size),
                              shard=_shard(chosen.shard))
    except (ParameterError, DataError) as error:
        sys.exit(str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        sys.exit(f"OUTPUT={chosen.output} " + ("is on a disk that is full: what is done is kept; free some room, and "
                 "the same command goes on." if full else f"cannot be written ({error.strerror or error})."))
    if counts:
        print(f"{', '.join(f'{count:,} {name}' for name, count in counts.items())}: {chosen.output}/predictions.jsonl")


if __name__ == "__main__":
    main()
