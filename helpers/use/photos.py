"""`make predict`: a folder of photos or a data set -> one JSON line a picture, and on request COCO results and crops.

    python -m helpers.use.photos photos/ out/ --coco --crops
    accelerate launch -m helpers.use.photos photos/ out/       # a process a GPU; each takes its share

Lines are appended to `out/unfinished-*.jsonl` as they come, and gathered in `out/predictions.jsonl` at the end. Each
names size and time of its picture's file: the same command goes on after a kill, and predicts again what is new or was
replaced under its name.
"""

import argparse
import contextlib
import errno
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size
from filelock import FileLock, Timeout
from PIL.Image import Image

from helpers import predict, runs
from helpers.boxes import CATEGORIES
from helpers.data import DataError, load_raw
from helpers.data.pictures import escaped, files_below, is_picture, open_picture
from helpers.runs import progress_bar, read_json, write_json, write_text
from helpers.settings import ParameterError, end_with_a_word
from helpers.use import load

Key = tuple[str, str]  # image id, and what changes where the picture does
Opener = Callable[[int], Image]  # opens the i-th picture, or raises ValueError


def find_pictures(source: str, split: str, output: Path) -> tuple[list[Key], Opener]:
    """The pictures of a folder (but those that were written into `output`) or a file, else of a data set's split.

    A picture of a folder has its path in it as image id. Raises ParameterError where there are none or none can be
    opened; `DataError` without the right to read, and that of `load_raw`.
    """
    place = Path(source).expanduser()
    if not place.exists() and source.startswith((".", "/", "~")):
        raise ParameterError(f"INPUT={source} is not there; name a folder of photos, a Hub id, or embedded.")
    found = list(files_below(place, links=True)) if place.is_dir() else [place] if place.exists() else []
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
    stats = [file.stat() if file.exists() else None for file in files]
    folder = place if place.is_dir() else place.parent
    return [(file.relative_to(folder).as_posix(), f"{stat.st_size} bytes, {stat.st_mtime_ns}" if stat else "gone")
            for file, stat in zip(files, stats, strict=True)], lambda i: load.open_upright(files[i])


def _check_that_one_opens(source: str, files: list[Path]) -> None:
    for file in files:
        try:
            return open_picture({"bytes": None, "path": file}).close()
        except Exception as error:  # Pillow's readers raise many kinds
            why = f"{escaped(file.name)}: {error}"
    raise ParameterError(f"INPUT={source} holds no picture that can be opened: {len(files)} files, such as {why}.")


def _of_data_set(source: str, split: str) -> tuple[list[Key], Opener]:
    try:
        rows = load_raw(source, val_share=1)
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

    return [(image_id, stored._fingerprint) for image_id in stored["image_id"]], opened


def read_lines(*files: Path) -> Iterator[tuple[Key, str]]:
    """The key and the text of every line that is whole: what a kill has cut off is none."""
    for text in (text for file in files if file.exists() for text in file.open()):
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            yield (line["image_id"], line["stamp"]), text.strip()


def gather(output: Path, name: str, wanted: Iterable[Key]) -> None:
    """Write the lines of `wanted` that `output` holds, finished or not, as one file `name`, whole."""
    missing = set(wanted)
    unfinished = [output / "unfinished.jsonl", *sorted(output.glob("unfinished-*.jsonl"))]
    with (output / f"{name}.part").open("w") as file:
        for key, text in read_lines(output / "predictions.jsonl", *unfinished):
            if key in missing:
                missing.remove(key)
                file.write(text + "\n")
    (output / f"{name}.part").replace(output / name)
    for path in unfinished:
        if path.name != name:
            path.unlink(missing_ok=True)


def read_ahead(opened: Opener, numbers: list[int], size: int) -> Iterator[list[tuple[int, Image | ValueError]]]:
    """Batches of `size` (number, picture or why there is none); while one is used, the next is decoded."""

    def read(i: int) -> tuple[int, Image | ValueError]:
        try:
            return i, opened(i)
        except ValueError as error:
            return i, error

    with ThreadPoolExecutor(max_workers=4) as pool:
        coming = [pool.submit(read, i) for i in numbers[:size]]
        for start in range(size, len(numbers) + size, size):
            ready, coming = coming, [pool.submit(read, i) for i in numbers[start : start + size]]
            yield [future.result() for future in ready]


def save_crops(line: dict, picture: Image, folder: Path) -> list[str]:
    """Cut the line's boxes out of `picture`; the files' paths below `folder`, with a part of the picture's name."""
    short, name = runs.key(image_id=line["image_id"]), re.sub(r"[^\w.-]", "_", line["image_id"])[-60:]
    files = [f"crops/{short[:2]}/{name}-{short}-{i}.jpg" for i in range(len(line["boxes"]))]
    for file, box in zip(files, line["boxes"], strict=True):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture.crop(load.to_pixels(box, picture.size)).save(folder / file, quality=95)
    return files


def predict_photos(source: str, output: Path, model: str | Path, *, split: str = "val", coco: bool = False,
                   crops: bool = False, batch_size: int = 16) -> dict[str, int] | None:
    """Predict all pictures of `source` with the merged model in folder `model`; returns the counts of `summary`.

    Under a launcher each process takes its share, and all but the first return None.
    """
    made_with = load.check(model)
    keys, opened = find_pictures(source, split, output)
    job = {"model": made_with["weights"], "prompt": made_with["prompt"], "crops": crops,
           "max_new_tokens": made_with.get("max_new_tokens", load.MAX_NEW_TOKENS)}
    output.mkdir(parents=True, exist_ok=True)
    before = read_json(output / "job.json")
    changed = [f"{name} was {before.get(name)!r}, now {job[name]!r}" for name in job if before.get(name) != job[name]]
    if before and changed:
        raise ParameterError(f"OUTPUT={output} holds the predictions of another job ({'; '.join(changed)}); name "
                             "another folder, or delete that one.")
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
    try:
        with FileLock(output / f".{processes.process_index}.lock", timeout=0):
            if processes.is_main_process:
                write_json(output / "job.json", job)
                gather(output, "unfinished.jsonl", keys)
            processes.wait_for_everyone()
            predict_share(keys, opened, output, model, crops, batch_size, processes)
            processes.wait_for_everyone()
            if processes.is_main_process:
                gather(output, "predictions.jsonl", keys)
                return summary(output, coco)
    except Timeout:
        raise ParameterError(f"another command is writing to OUTPUT={output}; wait for its end, or name another "
                             "folder.") from None
    return None


def predict_share(keys: list[Key], opened: Opener, output: Path, model: str | Path, crops: bool, batch_size: int,
                  processes: PartialState) -> None:
    """Append the lines that are still missing of this process's pictures; out of memory, in smaller batches."""
    done = {key for key, _ in read_lines(output / "unfinished.jsonl")}
    mine = range(processes.process_index, len(keys), processes.num_processes)
    todo = [i for i in mine if keys[i] not in done]
    bar = progress_bar(len(mine), len(mine) - len(todo), "predict", "picture", shown=processes.is_main_process)

    @find_executable_batch_size(starting_batch_size=batch_size)
    def work(size: int) -> None:
        with (output / f"unfinished-{processes.process_index}.jsonl").open("a") as file:
            for batch in read_ahead(opened, todo.copy(), size):
                rows = [load.as_row(keys[i][0], picture) for i, picture in batch if isinstance(picture, Image)]
                lines = iter(predict.generate_lines(vlm, processor, rows, prompt, {"do_sample": False}) if rows else [])
                for i, picture in batch:
                    if isinstance(picture, Image):
                        line = next(lines) | {"width": picture.width, "height": picture.height}
                        line |= {"crops": save_crops(line, picture, output)} if crops else {}
                    else:
                        line = {"image_id": keys[i][0], "text": "", "labels": [], "boxes": [], "confidences": [],
                                "rejected": [], "stopped": False, "new_tokens": 0, "width": 0, "height": 0,
                                "error": str(picture)}
                    file.write(json.dumps(line | {"stamp": keys[i][1]}) + "\n")
                file.flush()
                del todo[: len(batch)]
                bar.update(len(batch))

    if todo:
        vlm, processor, prompt = load.load_model(model)
        work()
    bar.close()


def summary(output: Path, coco: bool) -> dict[str, int]:
    """Counts of what is in `output/predictions.jsonl`; with `coco` written as COCO results too.

    A text that never stopped was cut off at the limit of tokens: it may lack boxes. `coco_images.json` numbers pictures
    and categories as COCO's `loadRes` wants them, and `coco_results.json` has the boxes, [x, y, width, height] in
    pixels, with the confidence as score; names other than `CATEGORIES` are numbered after them, as they come.
    """
    counts = {"pictures": 0, "with a box": 0, "without": 0, "unreadable": 0, "never stopped": 0}
    images, results, names = [], [], list(CATEGORIES)
    for number, (_, text) in enumerate(read_lines(output / "predictions.jsonl"), 1):
        line = json.loads(text)
        counts["pictures"] += 1
        counts["unreadable" if "error" in line else "with a box" if line["boxes"] else "without"] += 1
        counts["never stopped"] += "error" not in line and not line["stopped"]
        if coco:
            width, height = line["width"], line["height"]
            images.append({"id": number, "file_name": line["image_id"], "width": width, "height": height})
            for label, (x0, y0, x1, y1), score in zip(line["labels"], line["boxes"], line["confidences"], strict=True):
                names += [] if label in names else [label]
                box = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
                results.append({"image_id": number, "category_id": names.index(label), "score": score,
                                "bbox": [round(value, 2) for value in box]})
    if coco:
        categories = [{"id": number, "name": name} for number, name in enumerate(names)]
        write_text(output / "coco_images.json",
                   json.dumps({"images": images, "annotations": [], "categories": categories}))
        write_text(output / "coco_results.json", json.dumps(results))
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.use.photos", description="Boxes for many photos.")
    parser.add_argument("input", help="a folder of photos, a photo, or a data set: a Hub id, a local one, or embedded")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="a merged model's folder; the newest in runs/ where it is left out")
    parser.add_argument("--split", default="val", help="of a data set")
    parser.add_argument("--coco", action="store_true", help="also write coco_results.json and coco_images.json")
    parser.add_argument("--crops", action="store_true", help="also cut every box out of its picture")
    parser.add_argument("--batch-size", type=int, default=16)
    chosen = parser.parse_args(arguments)
    output = chosen.output.expanduser()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore  # names that are not UTF-8
    end_with_a_word()
    with load.one_sentence():
        try:
            counts = predict_photos(chosen.input, output, chosen.model or load.newest(), split=chosen.split,
                                    coco=chosen.coco, crops=chosen.crops, batch_size=max(1, chosen.batch_size))
        except OSError as error:
            sys.exit(f"OUTPUT={output} " + (
                "is on a disk that is full: what is done is kept; free some room, and the same command goes on."
                if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written ({error.strerror or error})."))
    PartialState().destroy_process_group()
    if counts:
        print(f"{', '.join(f'{count:,} {name}' for name, count in counts.items())}: {output}/predictions.jsonl")


if __name__ == "__main__":
    main()
