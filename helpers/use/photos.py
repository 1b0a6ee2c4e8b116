"""`make predict`: photos of a folder, zip, list, bucket or data set -> a JSON line each; COCO results, crops, Parquet.

    python -m helpers.use.photos photos/ out/ --coco --crops
    python -m helpers.use.photos s3://bucket/photos out/ --ray       # on all GPUs of this machine
    python -m helpers.use.photos s3://bucket/photos out/ --ray auto  # or of the Ray cluster that it belongs to

Lines are appended to a file in `out/predictions.parts/` as they come, and put together in `out/predictions.jsonl`. Each
has a stamp of its picture (id, size, time): the same command goes on after a kill, and predicts what is new or was
replaced under its name.
"""

import argparse
import errno
import functools
import ipaddress
import json
import mimetypes
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import datasets
import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import requests
from filelock import FileLock, Timeout
from fsspec.implementations.arrow import ArrowFSWrapper
from PIL.Image import Image
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from helpers import predict, runs
from helpers.boxes import CATEGORIES
from helpers.data import DataError, load_raw
from helpers.data.pictures import LEFTOVERS, escaped, files_below, is_picture, open_picture
from helpers.runs import read_json, write_json, write_text
from helpers.settings import ParameterError, end_with_a_word
from helpers.use import load

LARGEST = 2**28  # bytes of a download


class Picture(NamedTuple):
    image_id: str
    stamp: str  # a hash over the id and what changes where the picture does: the key of its line
    place: str  # what a `Reader` reads


Reader = Callable[[str], str | bytes]  # a place -> the path of a picture's file, or its content


# --- where pictures come from -----------------------------------------------------------------------------------------


def find_pictures(source: str, split: str, output: Path, private: bool = False) -> tuple[list[Picture], Reader]:
    """All pictures of `source`, and what reads them, on any machine that has the same files.

    `source`: a picture; a folder (but what was written into `output`), where a picture's id is its path in it; a .zip;
    a .txt with a path or URL a line; s3://bucket/prefix or gs://bucket/prefix; else a data set, of which `split`.
    `private`: whether URLs may lead to addresses of one's own network. Raises ParameterError where there are no
    pictures or none can be opened; `DataError` without the right to read, and that of `load_raw`.
    """
    place = Path(source).expanduser()
    read: Reader = functools.partial(read_place, private=private)
    if re.match("https?://", source):
        named = _listed([source], Path(), private)
    elif place.suffix.lower() == ".txt" and place.is_file():
        named = _listed(place.read_text(errors="surrogateescape").splitlines(), place.parent, private)
    elif "://" in source or (place.suffix.lower() == ".zip" and place.is_file()):
        within = source if "://" in source else str(place.resolve())
        named, read = _in_files(within), functools.partial(_read_file, within)
    else:
        named = _in_folder(place, source, output)
        if not named:
            return _of_data_set(source, split)
    if not named:
        raise ParameterError(f"INPUT={source} names no pictures (.jpg, .png, .webp, …).")
    _check_that_one_opens(source, named, read)
    return [Picture(image_id, runs.key(image_id=image_id, version=version), where)
            for image_id, version, where in named], read


Named = list[tuple[str, str, str]]  # image id, what changes where the picture does, place


def _version(file: Path) -> str:
    stat = file.stat() if file.exists() else None
    return f"{stat.st_size} bytes, {stat.st_mtime_ns}" if stat else "gone"


def _in_folder(place: Path, source: str, output: Path) -> Named:
    if not place.exists() and source.startswith((".", "/", "~")):
        raise ParameterError(f"INPUT={source} is not there; name a folder of photos, a Hub id, or embedded.")
    found = list(files_below(place, links=True)) if place.is_dir() else [place] if place.exists() else []
    own = output.resolve() if place.resolve() in output.resolve().parents else output.resolve() / "crops"
    found = [file for file in found if not file.parent.resolve().is_relative_to(own)]
    if place.is_dir() and not found:
        raise ParameterError(f"INPUT={source} is a folder without files; name one of photos, a Hub id, or embedded.")
    files = [file for file in found if is_picture(file)]
    if files and (other := sorted({*found} - {*files})):
        print(f"{len(other):,} files are no pictures by name or content, such as {escaped(other[0].name)}")
    folder = place if place.is_dir() else place.parent
    return [(file.relative_to(folder).as_posix(), _version(file), str(file.absolute())) for file in files]


def _listed(lines: list[str], folder: Path, private: bool) -> Named:
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    urls = [name for name in names if "://" in name]
    for host in () if private else dict.fromkeys(urlsplit(url).hostname for url in urls if url.startswith("http")):
        _refuse_private(host)
    return [(name, "", name) if "://" in name else (name, _version(folder / name), str((folder / name).absolute()))
            for name in names]


def _in_files(source: str) -> Named:
    try:
        files, root = _files(source)
        found = files.find(root, detail=True)
    except Exception as error:  # each kind of storage has its own
        raise ParameterError(f"INPUT={source} cannot be listed ({_first_line(error)}); check its name and your "
                             "rights.") from None
    return [(path.removeprefix(root).lstrip("/"), f"{info['size']} bytes, {info.get('mtime', info.get('CRC'))}", path)
            for path, info in found.items() if _is_photo(path)]


def _is_photo(name: str) -> bool:
    hidden = any(part.startswith(".") or part in LEFTOVERS for part in name.split("/"))
    return not hidden and (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/")


def _check_that_one_opens(source: str, named: Named, read: Reader) -> None:
    """A look at local files till one opens, at 20 of those that come through a network."""
    tried = named if Path(named[0][2]).is_absolute() else named[:20]
    for image_id, _, place in tried:
        try:
            content = read(place)
            return open_picture({"bytes": content if isinstance(content, bytes) else None, "path": content}).close()
        except Exception as error:  # Pillow's readers raise many kinds
            why = f"{escaped(image_id)}: {_first_line(error)}"
    raise ParameterError(f"INPUT={source} holds no picture that can be opened: {len(tried)} files, such as {why}.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _of_data_set(source: str, split: str) -> tuple[list[Picture], Reader]:
    try:
        stored = _rows(source, split)
    except DataError as error:
        here = Path(source).expanduser().exists()
        raise DataError(f"INPUT={source} holds no picture files, and as a data set: {error}" if here else str(error)) \
            from None
    return [Picture(image_id, runs.key(image_id=image_id, version=stored._fingerprint), str(i))
            for i, image_id in enumerate(stored["image_id"])], functools.partial(_read_row, source, split)


@functools.lru_cache(maxsize=1)
def _rows(source: str, split: str) -> datasets.Dataset:
    rows = load_raw(source, val_share=1)  # all of a set without val
    if split not in rows or not len(rows[split]):
        there = ", ".join(name for name in rows if len(rows[name]))
        raise ParameterError(f"INPUT={source} has no pictures in the split {split!r}; there is {there or 'none'}.")
    return rows[split].cast_column("image", datasets.Image(decode=False))


def _read_row(source: str, split: str, number: str) -> str | bytes:
    image = _rows(source, split)[int(number)]["image"]
    return image["bytes"] or image["path"]


@functools.lru_cache
def _files(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The files of a .zip or a bucket, and the path in it that `source` names."""
    if "://" not in source:
        return fsspec.filesystem("zip", fo=source), ""
    files, root = pyarrow.fs.FileSystem.from_uri(source)
    return ArrowFSWrapper(files), root


def _read_file(source: str, path: str) -> bytes:
    return _files(source)[0].cat_file(path)


def read_place(place: str, private: bool) -> str | bytes:
    """A local path as it is; the content of what http(s)://, s3:// or gs:// names."""
    scheme, mark, path = place.partition("://")
    if not mark:
        return place
    if not scheme.startswith("http"):
        return _read_file(f"{scheme}://{path.partition('/')[0]}", path)
    with _session(private).get(place, timeout=30, stream=True) as reply:
        reply.raise_for_status()
        content = reply.raw.read(LARGEST + 1, decode_content=True)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    return content


@functools.lru_cache
def _session(private: bool) -> requests.Session:
    session = requests.Session()
    again = Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
    for scheme in ("http://", "https://"):
        session.mount(scheme, (HTTPAdapter if private else _PublicAdapter)(max_retries=again))
    return session


class _PublicAdapter(HTTPAdapter):
    """Refuses addresses of one's own network, at each redirect too."""

    def send(self, request: Any, *given: Any, **named: Any) -> Any:
        _refuse_private(urlsplit(request.url).hostname)
        return super().send(request, *given, **named)


def _refuse_private(host: str | None) -> None:
    try:
        found = {str(address[0]).partition("%")[0] for *_, address in socket.getaddrinfo(host, None)}
    except OSError:  # no such host: whoever reads it says so
        return
    if not all(ipaddress.ip_address(address).is_global for address in found):
        raise ParameterError(f"{host} is an address of your own network, and a list of URLs may come from anywhere; "
                             "--private allows it.")


# --- one machine, or many ---------------------------------------------------------------------------------------------


class Predictor:
    """Opens pictures and runs the merged model in folder `model` on them; Ray makes one of it a GPU.

    `crops`: where each box is cut out to, or None.
    """

    def __init__(self, model: str, read: Reader, crops: Path | None, batch_size: int) -> None:
        runs.quiet_libraries()  # Ray starts each in a process of its own
        self.vlm, self.processor, self.prompt = load.load_model(model)
        self.read, self.crops, self.batch_size = read, crops, batch_size
        self.one_at_a_time = threading.Lock()

    def open(self, pictures: list[Picture]) -> list[Image | ValueError]:
        """The pictures, or why there is none."""

        def opened(picture: Picture) -> Image | ValueError:
            try:
                return load.open_upright(self.read(picture.place))
            except ValueError as error:
                return error
            except Exception as error:  # each source has its own
                return ValueError(f"cannot be read ({type(error).__name__}: {_first_line(error)})")

        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(opened, pictures))

    def generate(self, pictures: list[Picture], opened: list[Image | ValueError]) -> list[dict]:
        """A line a picture, in their order; in batches of pictures of about one size."""
        rows = [load.as_row(picture.stamp, image) for picture, image in zip(pictures, opened, strict=True)
                if isinstance(image, Image)]
        largest_first = sorted(range(len(rows)), key=lambda i: -rows[i]["image"].width * rows[i]["image"].height)
        with self.one_at_a_time:
            batches = list(predict.generate_batches(self.vlm, self.processor, rows, largest_first, self.prompt,
                                                    {"do_sample": False}, None, self.batch_size))
        if len(rows) >= self.batch_size:
            self.batch_size = max(map(len, batches))  # where memory ran out: what did fit
        found = {line["image_id"]: line for lines in batches for line in lines}
        lines = []
        for picture, image in zip(pictures, opened, strict=True):
            if isinstance(image, Image):
                line = found[picture.stamp] | {"width": image.width, "height": image.height}
            else:
                line = {"text": "", "labels": [], "boxes": [], "confidences": [], "rejected": [], "stopped": False,
                        "new_tokens": 0, "width": 0, "height": 0, "error": str(image)}
            line = {"image_id": picture.image_id} | line | {"image_id": picture.image_id, "stamp": picture.stamp}
            if self.crops and isinstance(image, Image):
                line["crops"] = save_crops(line, image, self.crops)
            lines.append(line)
        return lines

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """For Ray: columns `image_id` and `place` (bytes, as the operating system has them) and `stamp` -> lines."""
        pictures = [Picture(*map(os.fsdecode, one)) for one in zip(batch["image_id"], batch["stamp"], batch["place"],
                                                                 strict=True)]
        lines = self.generate(pictures, self.open(pictures))
        return {"stamp": [line["stamp"] for line in lines], "line": [json.dumps(line) for line in lines]}


def predict_here(pictures: list[Picture], options: dict[str, Any], size: int) -> Iterator[list[dict]]:
    """The lines of `size` pictures at a time; while the model works on some, the next are opened."""
    predictor = Predictor(**options)
    windows = [pictures[at : at + size] for at in range(0, len(pictures), size)]
    with ThreadPoolExecutor(max_workers=1) as ahead:
        coming = ahead.submit(predictor.open, windows[0])
        for window, following in pairwise([*windows, []]):
            opened, coming = coming.result(), ahead.submit(predictor.open, following)
            yield predictor.generate(window, opened)


def predict_on_ray(pictures: list[Picture], options: dict[str, Any], size: int, address: str,
                   folder: Path) -> Iterator[list[dict]]:
    """The lines of all pictures, when Ray has written them into `folder`, which all nodes share.

    Ray starts an actor a GPU (without GPUs, one for each two CPUs), gives the work of a lost one to others, and keeps
    in `folder` whose lines are written: another call makes only those that are missing.
    """
    import ray
    from ray.data.checkpoint import CheckpointConfig

    folder.mkdir(parents=True, exist_ok=True)
    columns = {"image_id": [os.fsencode(picture.image_id) for picture in pictures],
               "stamp": [picture.stamp for picture in pictures],
               "place": [os.fsencode(picture.place) for picture in pictures]}
    pyarrow.parquet.write_table(pa.table(columns), folder / "pictures.parquet")
    # with one or two CPUs the actors would leave none for reading and writing, and all would wait for ever
    where = {"num_cpus": max(4, os.cpu_count() or 1)} if address == "here" else {"address": address}
    try:
        ray.init(**where, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ParameterError(f"no Ray cluster answers at --ray {address} ({_first_line(error)}); start one with "
                             "`ray start --head`, or leave the address out.") from None
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig("stamp", str(folder / "done"), delete_checkpoint_on_success=False)
    gpus = ray.cluster_resources().get("GPU", 0)
    (ray.data.read_parquet(str(folder / "pictures.parquet"))
     .repartition(target_num_rows_per_block=size)
     .map_batches(Predictor, fn_constructor_kwargs=options, batch_size=size, num_gpus=min(1, gpus), num_cpus=1,
                  compute=ray.data.ActorPoolStrategy(min_size=1, max_concurrent_calls_per_actor=2,
                                                     enable_true_multi_threading=True))
     .write_parquet(str(folder / "lines"), min_rows_per_file=min(1000, 1 + len(pictures) // 100)))
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
    made_with = load.check(model)
    pictures, read = find_pictures(source, split, output, private)
    job = {"model": made_with["weights"], "prompt": made_with["prompt"], "crops": crops,
           "max_new_tokens": made_with.get("max_new_tokens", load.MAX_NEW_TOKENS)}
    output.mkdir(parents=True, exist_ok=True)
    before = read_json(output / "job.json")
    changed = [f"{name} was {before.get(name)!r}, now {job[name]!r}" for name in job if before.get(name) != job[name]]
    if before and changed:
        raise ParameterError(f"OUTPUT={output} holds the predictions of another job ({'; '.join(changed)}); name "
                             "another folder, or delete that one.")
    options = {"model": str(Path(model).expanduser().absolute()), "read": read, "batch_size": batch_size,
               "crops": output.absolute() if crops else None}
    path, size = output / "predictions.jsonl", 2 * batch_size

    def work(todo: list[int]) -> Iterator[list[dict]]:
        missing = [pictures[i] for i in todo]
        if ray is None:
            return predict_here(missing, options, size)
        return predict_on_ray(missing, options, size, ray, output.absolute() / "ray")

    try:
        with FileLock(output / ".lock", timeout=0):
            write_json(output / "job.json", job)
            predict.write_lines(path, [picture.stamp for picture in pictures], work, name="stamp",
                                before=[path] if path.exists() else [])
            shutil.rmtree(output / "ray", ignore_errors=True)
            return summary(output, coco, parquet)
    except Timeout:
        raise ParameterError(f"another command is writing to OUTPUT={output}; wait for its end, or name another "
                             "folder.") from None


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
    chosen = parser.parse_args(arguments)
    output = chosen.output.expanduser()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore  # names that are not UTF-8
    end_with_a_word()
    with load.one_sentence():
        try:
            counts = predict_photos(chosen.input, output, chosen.model or load.newest(), split=chosen.split,
                                    coco=chosen.coco, crops=chosen.crops, parquet=chosen.parquet, ray=chosen.ray,
                                    private=chosen.private, batch_size=max(1, chosen.batch_size))
        except OSError as error:
            sys.exit(f"OUTPUT={output} " + (
                "is on a disk that is full: what is done is kept; free some room, and the same command goes on."
                if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written ({error.strerror or error})."))
    print(f"{', '.join(f'{count:,} {name}' for name, count in counts.items())}: {output}/predictions.jsonl")


if __name__ == "__main__":
    from helpers.use import photos  # Ray's workers do not know what stands in __main__

    photos.main()
