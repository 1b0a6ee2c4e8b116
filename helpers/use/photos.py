"""`make predict`: photos of a folder, zip, list, bucket or data set -> a JSON line each; COCO results, crops, Parquet.

    python -m helpers.use.photos photos/ out/ --coco --crops
    python -m helpers.use.photos s3://bucket/photos out/ --ray       # on all GPUs of this machine
    python -m helpers.use.photos s3://bucket/photos out/ --ray auto  # or of the Ray cluster that it belongs to

Lines are appended to a file in `out/predictions.parts/` as they come, and put together in `out/predictions.jsonl`. Each
has a stamp of its picture (id, size, time): the same command goes on after a kill, and predicts what is new or was
replaced under its name.
"""

import argparse
import json
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL.Image import Image

from helpers import predict, runs
from helpers.boxes import CATEGORIES
from helpers.data.pictures import escaped
from helpers.processes import end_with_a_word
from helpers.runs import read_json, write_json, write_text
from helpers.settings import ParameterError
from helpers.use import load
from helpers.use.inputs import Picture, Reader, find_pictures
from helpers.use.load import first_line

READERS = 4  # pictures opened at the same time


class Predictor:
    """Opens pictures and runs the merged model in folder `model` on them; Ray makes one of it a GPU.

    `crops`: whether each box is cut out, into a folder in `output`.
    """

    def __init__(self, model: Path, output: Path, read: Reader, crops: bool, batch_size: int) -> None:
        if not (output / "job.json").exists():
            raise ParameterError(f"OUTPUT={output} is not there on {socket.gethostname()}: all machines must share it.")
        runs.quiet_libraries()  # Ray starts each in a process of its own
        self.vlm, self.processor, self.prompt = load.load_model(model)
        self.output, self.read, self.crops, self.batch_size = output, read, crops, batch_size
        self.passes = load.passes_of(model)
        self.one_at_a_time = threading.Lock()

    def open(self, picture: Picture) -> Image | str:
        """The picture, or why there is none."""
        try:
            return load.open_upright(self.read(picture.place))
        except ParameterError:  # nothing can be read there any more
            raise
        except Exception as error:  # each source has its own
            return first_line(error)

    def generate(self, pictures: list[Picture], opened: list[Image | str]) -> list[dict]:
        """A line a picture, in their order; in batches of pictures of about one size."""
        rows = [load.as_row(picture.stamp, image) for picture, image in zip(pictures, opened, strict=True)
                if isinstance(image, Image)]
        rows.sort(key=lambda row: row["image"].width * row["image"].height, reverse=True)
        with self.one_at_a_time:
            batches = list(predict.generate_batches(self.vlm, self.processor, rows, range(len(rows)), self.prompt,
                                                    {"do_sample": False}, None, self.batch_size, self.passes))
        if len(rows) >= self.batch_size:
            self.batch_size = max(map(len, batches))  # where memory ran out: what did fit
        found = {line["image_id"]: line for lines in batches for line in lines}
        lines = []
        for picture, image in zip(pictures, opened, strict=True):
            line = found.get(picture.stamp) or predict.line("", [], [], self.processor.tokenizer)
            line |= {"image_id": picture.image_id, "stamp": picture.stamp, "width": 0, "height": 0}
            if isinstance(image, Image):
                line |= {"width": image.width, "height": image.height}
                line |= {"crops": save_crops(line, image, self.output)} if self.crops else {}
            else:
                line["error"] = image
            lines.append(line)
        return lines

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """For Ray: columns `image_id` and `place` (bytes, as the operating system has them) and `stamp` -> lines."""
        columns = [map(os.fsdecode, batch[name]) for name in Picture._fields]
        pictures = [Picture(*one) for one in zip(*columns, strict=True)]
        with ThreadPoolExecutor(READERS) as pool:
            opened = list(pool.map(self.open, pictures))
        lines = self.generate(pictures, opened)
        return {"stamp": [line["stamp"] for line in lines], "line": [json.dumps(line) for line in lines]}


def predict_here(pictures: list[Picture], options: dict[str, Any], size: int) -> Iterator[list[dict]]:
    """The lines of `size` pictures at a time; while the model works on some, the next are opened."""
    predictor = Predictor(**options)
    windows = [pictures[at : at + size] for at in range(0, len(pictures), size)]
    with ThreadPoolExecutor(READERS) as pool:
        coming = pool.map(predictor.open, windows[0])
        for window, following in pairwise([*windows, []]):
            opened, coming = list(coming), pool.map(predictor.open, following)
            yield predictor.generate(window, opened)


def predict_on_ray(pictures: list[Picture], options: dict[str, Any], size: int, address: str,
                   folder: Path) -> Iterator[list[dict]]:
    """The lines of all pictures, when Ray has written them into `folder`, which all nodes share.

    Ray starts an actor a GPU (without GPUs, two CPUs), gives the work of a lost one to others, and keeps
    in `folder` whose lines are written: another call makes only those that are missing.
    """
    try:
        import ray
        from ray.data.checkpoint import CheckpointConfig
    except ImportError:
        raise ParameterError("--ray needs Ray: pip install '.[scale]'.") from None
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"image_id": [os.fsencode(picture.image_id) for picture in pictures],
               "stamp": [picture.stamp for picture in pictures],
               "place": [os.fsencode(picture.place) for picture in pictures]}
    pyarrow.parquet.write_table(pa.table(columns), folder / "pictures.parquet")
    where = {"num_cpus": max(4, os.cpu_count() or 1)} if address == "here" else {"address": address}
    try:
        if ":" in address:  # Ray itself tries for minutes
            host, port = address.rpartition("/")[2].rsplit(":", 1)
            socket.create_connection((host, port), timeout=20).close()
        ray.init(**where, ignore_reinit_error=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ParameterError(f"no Ray cluster answers at --ray {address} ({first_line(error)}); start one with "
                             "`ray start --head`, or leave the address out.") from None
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig("stamp", str(folder / "done"), delete_checkpoint_on_success=False)
    gpus, cpus = (ray.cluster_resources().get(kind, 0) for kind in ("GPU", "CPU"))
    if cpus < 4:  # an actor would leave none for reading and writing, and all would wait for ever
        raise ParameterError(f"the Ray cluster at --ray {address} has {cpus:g} CPUs, and 4 at least are needed.")
    pool = ray.data.ActorPoolStrategy(min_size=max(1, int(gpus)), max_concurrent_calls_per_actor=2,
                                      enable_true_multi_threading=True)  # one on each GPU from the start
    lines = (ray.data.read_parquet(str(folder / "pictures.parquet"))
             .repartition(target_num_rows_per_block=size)
             .map_batches(Predictor, fn_constructor_kwargs=options, batch_size=size, compute=pool,
                          num_cpus=1 if gpus else 2, num_gpus=min(1, gpus)))
    try:
        lines.write_parquet(str(folder / "lines"), min_rows_per_file=min(1000, 1 + len(pictures) // 100))
    except ray.exceptions.RayError as error:
        refused, last = re.search(r"ParameterError: (.+)", str(error)), str(error).strip().splitlines()[-1]
        raise ParameterError(refused[1] if refused else f"Ray could not finish ({last}); what is done is kept, and the "
                             "same command goes on.") from error
    for file in sorted((folder / "lines").glob("*.parquet")):
        yield [json.loads(line) for line in pyarrow.parquet.read_table(file)["line"].to_pylist()]


def save_crops(line: dict, picture: Image, folder: Path) -> list[str]:
    """Cut the line's boxes out of `picture`; the files' paths below `folder`, with a part of the picture's name."""
    short, name = runs.key(image_id=line["image_id"]), re.sub(r"[^\w.-]", "_", line["image_id"])[-60:]
    files = [f"crops/{short[:2]}/{name}-{short}-{i}.jpg" for i in range(len(line["boxes"]))]
    for file, box in zip(files, line["boxes"], strict=True):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture.crop(load.to_pixels(box, picture.size)).save(folder / file, quality=95)
    return files


def predict_photos(source: str, output: Path, model: str | Path, *, split: str = "val", coco: bool = False,
                   crops: bool = False, parquet: bool = False, batch_size: int = 16, ray: str | None = None,
                   private: bool = False) -> dict[str, int]:
    """Predict all pictures of `source` with the merged model in folder `model`; returns the counts of `summary`.

    `ray`: the address of a Ray cluster, or "here" for one on this machine alone.
    """
    made_with, batch_size = load.check(model), max(1, batch_size)
    pictures, read = find_pictures(source, split, output, private)
    job = {"model": made_with["weights"], "prompt": made_with["prompt"], "crops": crops,
           "max_new_tokens": made_with.get("max_new_tokens", load.MAX_NEW_TOKENS)}
    job |= {"passes": passes} if (passes := load.passes_of(model)) > 1 else {}
    output.mkdir(parents=True, exist_ok=True)
    before = read_json(output / "job.json")
    changed = [f"{name} was {before.get(name)!r}, now {job.get(name)!r}" for name in before | job
               if before.get(name) != job.get(name)]
    if before and changed:
        raise ParameterError(f"OUTPUT={output} holds the predictions of another job ({'; '.join(changed)}); name "
                             "another folder, or delete that one.")
    options = {"model": Path(model).expanduser().absolute(), "output": output.absolute(), "read": read, "crops": crops,
               "batch_size": batch_size}
    path, size = output / "predictions.jsonl", 2 * batch_size

    def work(todo: list[int]) -> Iterator[list[dict]]:
        missing = [pictures[i] for i in todo]
        if ray is None:
            return predict_here(missing, options, size)
        return predict_on_ray(missing, options, size, ray, output.absolute() / "ray")

    with runs.exclusive(output / ".job", wait=False):
        write_json(output / "job.json", job)
        predict.write_lines(path, [picture.stamp for picture in pictures], work, name="stamp",
                            before=[path] if path.exists() else [])
        shutil.rmtree(output / "ray", ignore_errors=True)
        return summary(output, coco, parquet)


LINE = pa.schema({"image_id": pa.string(), "text": pa.string(), "labels": pa.list_(pa.string()),
                  "boxes": pa.list_(pa.list_(pa.float64(), 4)), "confidences": pa.list_(pa.float64()),
                  "rejected": pa.list_(pa.string()), "stopped": pa.bool_(), "new_tokens": pa.int64(),
                  "width": pa.int64(), "height": pa.int64(), "error": pa.string(), "crops": pa.list_(pa.string()),
                  "stamp": pa.string()})


def summary(output: Path, coco: bool, parquet: bool = False) -> dict[str, int]:
    """Counts of what is in `output/predictions.jsonl`; with `coco` written as COCO results too, with `parquet` as a
    table in `predictions.parquet` (an id that is not UTF-8 `escaped`).

    A text that never stopped was cut off at the limit of tokens: it may lack boxes. `coco_images.json` numbers pictures
    and categories as COCO's `loadRes` wants them, and `coco_results.json` has the boxes, [x, y, width, height] in
    pixels, with the confidence as score; names other than `CATEGORIES` are numbered after them, as they come.
    """
    counts = {"pictures": 0, "with a box": 0, "without": 0, "unreadable": 0, "never stopped": 0}
    images, results, names = [], [], list(CATEGORIES)
    for number, line in enumerate(map(json.loads, (output / "predictions.jsonl").open()), 1):
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
    if parquet:
        whole = output / "predictions.parquet.part"
        with pyarrow.parquet.ParquetWriter(whole, LINE) as table, (output / "predictions.jsonl").open() as file:
            while some := [json.loads(text) for text in islice(file, 10_000)]:
                rows = [line | {"image_id": escaped(line["image_id"])} for line in some]
                table.write_table(pa.Table.from_pylist(rows, LINE))
        whole.replace(output / "predictions.parquet")
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.use.photos", description="Boxes for many photos.")
    parser.add_argument("input", help="a photo, a folder or .zip of photos, a .txt of paths or URLs, s3://…, "
                        "gs://…, or a data set: Parquet, another local one, a Hub id, or embedded")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="a merged model's folder; the newest in runs/ where it is left out")
    parser.add_argument("--split", default="val", help="of a data set")
    parser.add_argument("--coco", action="store_true", help="also write coco_results.json and coco_images.json")
    parser.add_argument("--crops", action="store_true", help="also cut every box out of its picture")
    parser.add_argument("--parquet", action="store_true", help="also write the lines as predictions.parquet")
    parser.add_argument("--private", action="store_true", help="URLs may lead to addresses of your own network")
    parser.add_argument("--ray", nargs="?", const="here", metavar="ADDRESS", help="run on all GPUs of a Ray cluster "
                        "(auto: the one this machine belongs to); without ADDRESS on all of this machine")
    parser.add_argument("--batch-size", type=int, default=16)
    chosen = vars(parser.parse_args(arguments))
    source, output, model = chosen.pop("input"), chosen.pop("output").expanduser(), chosen.pop("model")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore  # names that are not UTF-8
    end_with_a_word()
    with load.one_sentence():
        try:
            counts = predict_photos(source, output, model or load.newest(), **chosen)
        except OSError as error:
            sys.exit(f"OUTPUT={output} cannot be written ({error.strerror or error}); what is done is kept, and the "
                     "same command goes on.")
    print(f"{', '.join(f'{count:,} {name}' for name, count in counts.items())}: {output}/predictions.jsonl")


if __name__ == "__main__":
    from helpers.use import photos  # Ray's workers do not know what stands in __main__

    photos.main()
